"""An encoder process whose tower costs nothing: what is left of Encode is transport.

`python -m deploy.bench.null_encoder FOLDER`: the checkpoint in FOLDER gives the fingerprint.  Everything but
the tower is the real service.  Prints its port, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
import uvloop

from encoder_service.config import EncoderConfig
from encoder_service.servicer import EncoderServicer
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.malloc import tune_malloc
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from protos.server import Server, ServerConfig

# 256 visual tokens of 4096 bfloat16 are the 2 MiB of an 8B model's tile; the pixels are few on purpose.
HIDDEN_SIZE = 4096
TOKENS_PER_TILE = 256
TILE_SIDE = 32
MAX_TILES = 40


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

    def __init__(self, max_batch_tiles: int) -> None:
        self._embeds = torch.randn(max_batch_tiles, TOKENS_PER_TILE, HIDDEN_SIZE).to(self.dtype)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        return self._embeds[: len(tiles)]


async def main(folder: Path) -> None:
    config = EncoderConfig(host_cache_mib=0)  # every tile is made and sent
    base = FingerprintBase(open_checkpoint(str(folder)))
    servicer = EncoderServicer(config, base, NullVision(config.batch_tiles("cpu")))
    server = Server(ServerConfig(), [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    port = await server.start()
    await server.set_serving()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.grpc.stop(0)
    servicer.close()


if __name__ == "__main__":
    tune_malloc()
    uvloop.run(main(Path(sys.argv[1])))
