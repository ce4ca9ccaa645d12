"""The encoder's work on a GPU, waited for only at its end: tiles, forwards, and embeddings to the host.

Imported only where there is a GPU.  Knows nothing about requests or transport.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from encoder_service.batch_size import resolve_batch_sizes
from encoder_service.batcher import FORWARDS_IN_PROGRESS, ForwardResult
from encoder_service.gpu_tiling import GpuTiler
from encoder_service.model.fused_vision import FusedVision
from encoder_service.tile_slots import TileSlots
from encoder_service.tiling import Cutter, TilePlan
from encoder_service.tower_graphs import TowerGraphs, time_forward
from encoder_service.vision import VisionEncoder, normalized_values

# Batches whose page-locked memory is there from the start: two on their way, as many being sent to clients.
_BATCHES_PINNED = 4
# More make no tower cheaper that was measured (InternViT-300M: 1 % from 16 to 32 at most).
MOST_TILES = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CudaForward:
    """A forward in the GPU's queue, and the way of its embeddings to the host."""

    host: list[torch.Tensor]  # page-locked [tokens_per_tile, output_size], each with storage of its own
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    arrived: torch.cuda.Event
    on_device: list[torch.Tensor]  # for a cache, each with storage of its own; or none

    def result(self) -> ForwardResult:
        """Block until the embeddings are on the host; the GPU's own times."""
        self.arrived.synchronize()
        return ForwardResult(
            self.host,
            encode_ns=int(self.begun.elapsed_time(self.ended) * 1e6),
            transfer_ns=int(self.ended.elapsed_time(self.arrived) * 1e6),
            on_device=self.on_device,
        )


class CudaVision:
    """A VisionEncoder's model, captured; streams for tiling, for forwards and for what leaves the GPU."""

    def __init__(
        self,
        encoder: VisionEncoder,
        max_batch_tiles: int = 0,
        cache_bytes: int = 0,
        first_batch_tiles: int = 0,
        slots: TileSlots | None = None,
    ) -> None:
        """Takes seconds: kernels are compiled and graphs captured.

        Args:
            max_batch_tiles: Of a forward; 0: measured.
            cache_bytes: Of the device's memory, for tiles that stay there; 0: forwards leave none.
            first_batch_tiles: Of a forward that finds the GPU idle; 0: measured.
            slots: Where embeddings come to the host while there are free ones; front ends read them there.
        """
        start = time.monotonic()
        self.preprocessing = encoder.preprocessing
        self.hidden_size = encoder.hidden_size
        self.dtype = encoder.dtype
        self.device = encoder.device
        self.uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        self._output_shape = (encoder.config.tokens_per_tile, encoder.hidden_size)
        self._forwards = torch.cuda.Stream(self.device)
        self._copies = torch.cuda.Stream(self.device)
        self._reads = torch.cuda.Stream(self.device)  # of cached tiles: they wait for no forward
        self._keeps_tiles = cache_bytes > 0
        self._slots = slots
        if slots is not None:
            slots.pin()
        self.tiler = GpuTiler(self.device, encoder.preprocessing.image_size)
        fused = FusedVision(
            encoder.model.tower, encoder.model.projector, encoder.config, normalized_values(encoder)
        )
        shapes = encoder.tile_shape, self._output_shape, self.dtype
        forward_s = partial(time_forward, fused, self._forwards, *shapes)
        self.batch_sizes = resolve_batch_sizes(first_batch_tiles, max_batch_tiles, MOST_TILES, forward_s)
        log.info("forwards of at most %d tiles, %d when idle", self.batch_sizes.most, self.batch_sizes.first)
        most = self.batch_sizes.most
        self._graphs = TowerGraphs(fused, self._forwards, most, *shapes)
        # Its kernels are compiled by this.
        self.makes_pillows_tiles = self.tiler.equals_pillow()
        if not self.makes_pillows_tiles:
            log.warning(
                "the GPU's tiles are not those of the Pillow that is installed: tiles are cut on the CPU"
            )
        self._take_pinned_memory(most)
        if self._keeps_tiles:
            self._take_device_memory(cache_bytes, FORWARDS_IN_PROGRESS * most)
        log.info("the GPU is ready after %.1f s", time.monotonic() - start)

    def make_tiles(self, image: Image.Image, plan: TilePlan) -> Cutter:
        """All tiles of an RGB picture, enqueued; may be called from several threads."""
        return self.tiler.make(image, plan)

    @torch.inference_mode()
    def launch(self, tiles: Sequence[torch.Tensor]) -> CudaForward:
        """Enqueue a forward and the transfer of its embeddings.

        Args:
            tiles: uint8 [3, S, S] each, at most `batch_sizes.most`; from `make_tiles`, or ready on the GPU or
                the host.
        """
        # All of them before the first copy: one that is under way must not lose its slot to an error here.
        host = [self._new_host_tile() for _ in tiles]
        begun, ended, arrived = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(3))
        with torch.cuda.stream(self._forwards):
            if self.tiler.stream is not None:
                self._forwards.wait_stream(self.tiler.stream)
            begun.record()
            embeds = self._graphs.run(tiles)
            on_device = [tile.clone() for tile in embeds] if self._keeps_tiles else []
            ended.record()
        for tile in tiles:
            if tile.is_cuda:
                tile.record_stream(self._forwards)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(ended)
            for memory, tile in zip(host, embeds, strict=True):
                memory.copy_(tile, non_blocking=True)
            arrived.record()
        embeds.record_stream(self._copies)
        return CudaForward(host, begun, ended, arrived, on_device)

    @torch.inference_mode()
    def to_host(self, tile: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of a tile that a forward has left on the GPU; one on the host as it is.

        Blocks until it is there; may be called while forwards are launched.
        """
        if not tile.is_cuda:
            return tile
        arrived = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._reads):
            host = self._new_host_tile().copy_(tile, non_blocking=True)
            arrived.record()
        arrived.synchronize()
        return host

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [num_tiles, 3, S, S] -> [num_tiles, tokens_per_tile, hidden_size] on the host"""
        on_gpu = tiles.to(self.device)
        torch.cuda.current_stream(self.device).synchronize()
        batches = on_gpu.split(self._graphs.max_tiles)
        forwards = [self.launch(list(batch)) for batch in batches]
        return torch.stack([tile for forward in forwards for tile in forward.result().embeds])

    def _new_host_tile(self) -> torch.Tensor:
        """Page-locked."""
        tile = None if self._slots is None else self._slots.new_tile(self._output_shape, self.dtype)
        return torch.empty(self._output_shape, dtype=self.dtype, pin_memory=True) if tile is None else tile

    def _take_pinned_memory(self, max_batch_tiles: int) -> None:
        """The allocator keeps it; from the system a tile takes about 1 ms."""
        kept = [self._new_host_tile() for _ in range(_BATCHES_PINNED * max_batch_tiles)]
        del kept

    def _take_device_memory(self, num_bytes: int, num_tiles: int) -> None:
        """Now, so that a language model that plans its memory later finds it taken."""
        with torch.cuda.stream(self._forwards):  # whose blocks the allocator keeps apart
            tile = torch.empty(self._output_shape, dtype=self.dtype, device=self.device)
            kept = [torch.empty_like(tile) for _ in range(num_bytes // tile.nbytes + num_tiles)]
            del kept, tile
