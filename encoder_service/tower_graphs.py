"""CUDA graphs of the vision model, one for each number of tiles of a ladder, captured at the start.

Imported only where there is a GPU.  Knows nothing about pictures, requests or threads.
"""

from __future__ import annotations

import logging
import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch

from encoder_service.model.fused_vision import FusedVision

# Small pictures and the usual layouts (7: 1344x896, 10: square, 13: 4:3) are computed without padding.
LADDER = (1, 2, 3, 4, 5, 7, 8, 10, 13, 16, 20, 24, 26, 28, 32)
_LADDER_STEP = 8  # beyond
# Before a capture: kernels are compiled and libraries choose and load theirs.
_WARM_UPS = 2
_TIMED = 3

log = logging.getLogger(__name__)


def ladder(max_tiles: int) -> list[int]:
    """Numbers of tiles to capture; a batch is padded to the next one."""
    sizes = (*LADDER, *range(LADDER[-1] + _LADDER_STEP, max_tiles, _LADDER_STEP))
    return [*(size for size in sizes if size < max_tiles), max_tiles]


@torch.inference_mode()
def time_forward(
    vision: FusedVision,
    stream: torch.cuda.Stream,
    tile_shape: tuple[int, int, int],
    output_shape: tuple[int, int],
    dtype: torch.dtype,
    num_tiles: int,
) -> float:
    """Seconds of a forward of blank tiles, launch by launch: the median of some."""
    device = stream.device
    tiles = torch.zeros((num_tiles, *tile_shape), dtype=torch.uint8, device=device)
    output = torch.empty((num_tiles, *output_shape), dtype=dtype, device=device)
    torch.cuda.synchronize(device)  # weights and buffers were filled on another stream
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_TIMED + 1)]
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            vision.forward(tiles, output)
        events[0].record()
        for event in events[1:]:
            vision.forward(tiles, output)
            event.record()
    stream.synchronize()
    times_ms: list[float] = [start.elapsed_time(end) for start, end in pairwise(events)]
    return statistics.median(times_ms) * 1e-3


class TowerGraphs:
    """Replays on one stream; all graphs share their memory, input and output.  Calls must not overlap."""

    def __init__(
        self,
        vision: FusedVision,
        stream: torch.cuda.Stream,
        max_tiles: int,
        tile_shape: tuple[int, int, int],
        output_shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """`output_shape`: [tokens_per_tile, output_size] of a tile."""
        device = stream.device
        self._vision = vision
        self._stream = stream
        self._sizes = ladder(max_tiles)
        self._tiles = torch.zeros((max_tiles, *tile_shape), dtype=torch.uint8, device=device)
        self._output = torch.empty((max_tiles, *output_shape), dtype=dtype, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)  # weights and buffers were filled on another stream
        start, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        # The largest first: the others fit into the memory that it took.
        self._graphs = {size: self._capture(size) for size in reversed(self._sizes)}
        used_mib = (free - torch.cuda.mem_get_info(device)[0]) >> 20
        log.info(
            "captured the tower for %s tiles in %.1f s, %d MiB",
            ", ".join(map(str, self._sizes)),
            time.monotonic() - start,
            used_mib,
        )

    @property
    def max_tiles(self) -> int:
        return self._sizes[-1]

    @torch.inference_mode()
    def run(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        """Enqueue a forward on the stream, which must be the current one.

        Args:
            tiles: uint8 [3, S, S] each, all on the GPU or all on the host; at most `max_tiles`.

        Returns:
            [len(tiles), tokens_per_tile, output_size], with storage of its own.
        """
        num_tiles = len(tiles)
        assert 1 <= num_tiles <= self.max_tiles, num_tiles
        if tiles[0].is_cuda:
            torch.stack(list(tiles), out=self._tiles[:num_tiles])
        else:
            self._tiles[:num_tiles].copy_(torch.stack(list(tiles)))
        self._graphs[self._sizes[bisect_left(self._sizes, num_tiles)]].replay()
        return self._output[:num_tiles].clone()

    def _capture(self, num_tiles: int) -> torch.cuda.CUDAGraph:
        tiles, output = self._tiles[:num_tiles], self._output[:num_tiles]
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self._vision.forward(tiles, output)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._vision.forward(tiles, output)
        return graph
