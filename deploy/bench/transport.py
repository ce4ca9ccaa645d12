"""Visual tokens from the encoder through the real Encode call into staging memory, against a raw socket."""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import uvloop
from PIL import Image

from deploy.bench.cpu_time import cpu_seconds
from deploy.bench.null_encoder import (
    BATCH_TILES,
    HIDDEN_SIZE,
    MAX_TILES,
    TILE_BYTES,
    TILE_SIDE,
    TOKENS_PER_TILE,
)
from deploy.bench.raw_socket import RawSocket
from llm_service.config import EncoderPoolConfig
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.picture import Picture, TileId
from llm_service.process import FRONT_END_THREADS
from llm_service.visual_memory import VisualMemory
from protos.checkpoint import open_checkpoint
from protos.errors import ServingError
from protos.fingerprint import FingerprintBase, content_hash
from protos.malloc import tune_malloc
from protos.tensors import tensor_bytes

PICTURES_PER_STREAM = 8  # of 40 tiles each: 640 MiB, so that how a stream begins counts for little
STREAMS_PER_ROUND = 2  # at a time
TILES_PER_STREAM = PICTURES_PER_STREAM * MAX_TILES
ROUNDS = 5
ATTACH_TIMEOUT_S = 10.0
RAW, INLINE, SHARED_MEMORY = "raw TCP socket", "Encode, inline", "Encode, shared memory"
# Of what the raw socket moves.
REQUIRED_RATIOS = {INLINE: 0.5, SHARED_MEMORY: 2.0}


@dataclass(frozen=True)
class Sample:
    bytes_per_second: float
    cpu_s_per_gib: float  # of both processes


def run(checkpoint: Path, rounds: int = ROUNDS, streams_per_round: int = STREAMS_PER_ROUND) -> bool:
    """Print the ratios; True when they reach what the project promises."""
    tune_malloc()
    torch.set_num_threads(FRONT_END_THREADS)
    encoder = subprocess.Popen(
        [sys.executable, "-m", "deploy.bench.null_encoder", str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert encoder.stdin is not None and encoder.stdout is not None
    port = int(encoder.stdout.readline())
    try:
        samples = uvloop.run(_measure(checkpoint, port, encoder.pid, rounds, streams_per_round))
    finally:
        encoder.stdin.close()
        encoder.wait(30)
    print("visual tokens, encoder to staging memory (2 MiB tiles, two processes on loopback; medians)")
    print(f"{'':24}   GiB/s  CPU-s/GiB  of raw")
    reached = True
    for name, sample in samples.items():
        ratio = sample.bytes_per_second / samples[RAW].bytes_per_second
        required = REQUIRED_RATIOS.get(name, 0)
        reached = reached and ratio >= required
        promise = f"   (promised: >= {required})" if required else ""
        rate, cpu = sample.bytes_per_second / 2**30, sample.cpu_s_per_gib
        print(f"  {name:22} {rate:7.2f} {cpu:10.2f} {ratio:7.2f}{promise}")
    return reached


async def _measure(
    checkpoint: Path, port: int, encoder_pid: int, rounds: int, streams_per_round: int
) -> dict[str, Sample]:
    """Medians, measured in turns."""
    memory = VisualMemory.create(MAX_TILES, TOKENS_PER_TILE, HIDDEN_SIZE, torch.bfloat16)
    samples: dict[str, list[Sample]] = {RAW: [], INLINE: [], SHARED_MEMORY: []}
    async with AsyncExitStack() as stack:
        # The yardstick reads from as much memory and writes to the same.
        raw = stack.enter_context(RawSocket(TILE_BYTES, BATCH_TILES))
        slots = [tensor_bytes(memory.rows(slot, 0, TOKENS_PER_TILE)) for slot in range(MAX_TILES)]
        pools = {}
        for name, transport in {INLINE: "inline", SHARED_MEMORY: "auto"}.items():
            pools[name] = await _pool(checkpoint, port, transport)
            stack.push_async_callback(pools[name].close)
            await _fetch(pools[name], memory, streams_per_round)  # both sides' heaps grow once
        for _ in range(rounds):
            send = partial(
                asyncio.to_thread, raw.bytes_per_second, streams_per_round * TILES_PER_STREAM, slots
            )
            samples[RAW].append(await _sample(send, raw.pid, streams_per_round))
            for name, pool in pools.items():
                fetch = partial(_fetch, pool, memory, streams_per_round)
                samples[name].append(await _sample(fetch, encoder_pid, streams_per_round))
    return {
        name: Sample(
            statistics.median(sample.bytes_per_second for sample in of_name),
            statistics.median(sample.cpu_s_per_gib for sample in of_name),
        )
        for name, of_name in samples.items()
    }


async def _sample(move: Callable[[], Awaitable[object]], other_pid: int, num_streams: int) -> Sample:
    pids = (os.getpid(), other_pid)
    num_bytes = num_streams * TILES_PER_STREAM * TILE_BYTES
    start_s, start_cpu_s = time.perf_counter(), cpu_seconds(pids)
    await move()
    seconds, cpu_s = time.perf_counter() - start_s, cpu_seconds(pids) - start_cpu_s
    return Sample(num_bytes / seconds, cpu_s / num_bytes * 2**30)


async def _pool(checkpoint: Path, port: int, transport: str) -> EncoderPool:
    """Ready, and with a ring where it is to have one."""
    base = FingerprintBase(open_checkpoint(str(checkpoint)))
    config = EncoderPoolConfig(encoders=(f"127.0.0.1:{port}",), tile_transport=transport)
    pool = EncoderPool(config, base)
    pool.start()
    await pool.fingerprint()
    async with asyncio.timeout(ATTACH_TIMEOUT_S):
        while transport == "auto" and pool.connections[0].ring is None:
            await asyncio.sleep(0.01)
    return pool


async def _fetch(pool: EncoderPool, memory: VisualMemory, num_streams: int) -> None:
    """At a time, as a front end has them; one alone would not keep both processes busy."""
    pictures = _pictures(await pool.fingerprint())
    await asyncio.gather(*(_fetch_all_tiles(pool, pictures, memory) for _ in range(num_streams)))


async def _fetch_all_tiles(pool: EncoderPool, pictures: list[Picture], memory: VisualMemory) -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    missing = TILES_PER_STREAM

    def write(tile: TileId, embeds: torch.Tensor) -> None:
        memory.write(tile.tile, embeds)

    def on_tile(tile: TileId) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            done.set_result(None)

    def on_error(error: ServingError) -> None:
        done.set_exception(error)

    salt = os.urandom(16)  # or streams of one picture at a time would share its tiles at the encoder
    encoding = Encoding(
        pictures, pool, LayoutCache(), HIDDEN_SIZE, (), salt, 0, write, on_tile=on_tile, on_error=on_error
    )
    try:
        await encoding.layout()
        for medium in range(PICTURES_PER_STREAM):
            for tile in range(MAX_TILES):
                encoding.want(TileId(medium, tile))
        await done
    finally:
        await encoding.close()


def _pictures(fingerprint: bytes) -> list[Picture]:
    return [_picture(fingerprint, shade) for shade in range(PICTURES_PER_STREAM)]


def _picture(fingerprint: bytes, shade: int) -> Picture:
    file = io.BytesIO()
    Image.new("L", (8 * TILE_SIDE, 5 * TILE_SIDE), shade).save(file, "PNG")
    data = file.getvalue()
    name = content_hash(data, MAX_TILES, MAX_TILES, False, fingerprint)
    return Picture(data, MAX_TILES, MAX_TILES, False, name, fingerprint)
