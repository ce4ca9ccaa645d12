"""An encoder process whose tower costs nothing: what is left of Encode is transport.

`python -m deploy.bench.null_encoder FOLDER`: the checkpoint in FOLDER gives the fingerprint.  Everything but
the tower is the real service.  Prints its port, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
from PIL import Image

from encoder_service.batch_size import BatchSizes
from encoder_service.batcher import ForwardResult
from encoder_service.config import GPU_SLOTS, EncoderConfig
from encoder_service.servicer import EncoderServicer
from encoder_service.tile_slots import TileSlots
from encoder_service.tiling import Cutter, TilePlan
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.malloc import tune_malloc
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from protos.server import Server, ServerConfig

# 256 visual tokens of 4096 bfloat16 are the 2 MiB of an 8B model's tile; the pixels are few on purpose.
HIDDEN_SIZE = 4096
TOKENS_PER_TILE = 256
TILE_BYTES = TOKENS_PER_TILE * HIDDEN_SIZE * torch.bfloat16.itemsize
TILE_SIDE = 32
MAX_TILES = 40
BATCH_TILES = 32


class NullVision:
    preprocessing = Preprocessing(
        image_size=TILE_SIDE,
        patch_size=1,
        downsample_ratio=0.5,
        ps_version="v2",
        min_tiles=MAX_TILES,
        max_tiles=MAX_TILES,
        use_thumbnail=False,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    hidden_size = HIDDEN_SIZE
    dtype = torch.bfloat16

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        raise AssertionError("NullGpu encodes")


class NullGpu:
    """What a GPU leaves to the rest of the service: finished tiles in host memory, one by one.

    In slots of the ring, into which a GPU would write; where none is free, in memory of its own.
    """

    makes_pillows_tiles = True
    uuid = ""

    def __init__(self, slots: TileSlots) -> None:
        self._slots = slots
        self.batch_sizes = BatchSizes(BATCH_TILES, BATCH_TILES)
        self._embeds = list(torch.randn(BATCH_TILES, TOKENS_PER_TILE, HIDDEN_SIZE).bfloat16())
        self._tile = torch.zeros(3, TILE_SIDE, TILE_SIDE, dtype=torch.uint8)

    def make_tiles(self, image: Image.Image, plan: TilePlan) -> Cutter:
        return self

    def cut(self, tiles: Sequence[int]) -> list[torch.Tensor]:
        return [self._tile] * len(tiles)

    def launch(self, tiles: Sequence[torch.Tensor]) -> NullForward:
        in_slots = [self._slots.new_tile((TOKENS_PER_TILE, HIDDEN_SIZE), torch.bfloat16) for _ in tiles]
        return NullForward(
            [
                embeds if in_slot is None else in_slot
                for embeds, in_slot in zip(self._embeds, in_slots, strict=False)
            ]
        )

    def to_host(self, tile: torch.Tensor) -> torch.Tensor:
        return tile


@dataclass(frozen=True)
class NullForward:
    embeds: list[torch.Tensor]

    def result(self) -> ForwardResult:
        return ForwardResult(self.embeds, 0, 0)


async def main(folder: Path) -> None:
    config = EncoderConfig(host_cache_mib=0, device_cache_mib=0)  # every tile is made and sent
    base = FingerprintBase(open_checkpoint(str(folder)))
    slots = TileSlots.create(config.tile_ring_mib << 20, TILE_BYTES, GPU_SLOTS)
    if slots is None:
        raise SystemExit("there is no shared memory")
    servicer = EncoderServicer(config, base, NullVision(), NullGpu(slots), slots=slots)
    server = Server(ServerConfig(), [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.start()
    port = await server.start()
    await server.set_serving()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.grpc.stop(0)
    await servicer.stop()


if __name__ == "__main__":
    tune_malloc()
    uvloop.run(main(Path(sys.argv[1])))
