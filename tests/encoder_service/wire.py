"""The encoder service on a free port of this process, and a client that writes its own messages."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from PIL import Image

from encoder_service.config import CPU_SLOTS, EncoderConfig
from encoder_service.media_fetcher import MediaFetcher
from encoder_service.servicer import EncoderServicer, Vision
from encoder_service.tile_slots import TileSlots
from protos import encoder_pb2, tensor_pb2
from protos.channel import open_channel
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, EncodeCall, EncoderStub, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.frames import TileFrame
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from protos.server import Server, ServerConfig

TIMEOUT_S = 20
# One picture of 12 tiles and a thumbnail for vision of this size.
SIDE = 28


class ScriptedVision:
    """Every embedding of a tile is its mean pixel; a forward waits for `gate`, which is open at first."""

    preprocessing = Preprocessing(
        image_size=SIDE,
        patch_size=14,
        downsample_ratio=0.5,
        ps_version="v2",
        min_tiles=1,
        max_tiles=12,
        use_thumbnail=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    dtype = torch.float32

    def __init__(self, hidden_size: int = 8) -> None:
        self.hidden_size = hidden_size
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(tiles))
        assert self.gate.wait(TIMEOUT_S)
        if self.fails:
            raise RuntimeError("secret of a library")
        means = tiles.float().mean(dim=(1, 2, 3))
        return means[:, None, None].expand(-1, 1, self.hidden_size)


@dataclass
class Service:
    servicer: EncoderServicer
    server: Server
    channel: grpc.aio.Channel
    stub: EncoderStub
    idle_tasks: int

    @property
    def slots(self) -> TileSlots | None:
        return self.servicer._slots

    async def load(self) -> dict[str, int]:
        """What streams hold: all zero when none is left."""
        model = await self.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
        return {
            "streams": model.streams_open,
            "tiles": model.tiles_queued,
            "pixel_bytes": self.servicer._workers.pixels.used_bytes,
            "tasks": max(len(asyncio.all_tasks()) - self.idle_tasks, 0),
            "slots": 0 if self.slots is None else self.slots.num_in_use,
        }

    async def until_load(self, **expected: int) -> None:
        deadline_s = time.monotonic() + 5
        while expected.items() - (load := await self.load()).items():
            assert time.monotonic() < deadline_s, f"{load} is not {expected}: {asyncio.all_tasks()}"
            await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        await self.until_load(streams=0, tiles=0, pixel_bytes=0, tasks=0, slots=0)


@asynccontextmanager
async def serving(
    checkpoint: Path, vision: Vision, fetcher: MediaFetcher | None = None, **config: Any
) -> AsyncIterator[Service]:
    """The service with that vision; at the end it must be idle.

    It keeps no tiles and shares no memory unless told to.
    """
    base = FingerprintBase(open_checkpoint(str(checkpoint)))
    defaults: dict[str, Any] = {
        "model": "a model",
        "host_cache_mib": 0,
        "max_batch_tiles": 16,
        "tile_ring_mib": 0,
    }
    settings = EncoderConfig(**defaults | config)
    slots = make_slots(vision, settings)
    servicer = EncoderServicer(settings, base, vision, fetcher=fetcher, slots=slots)
    server = Server(ServerConfig(shutdown_grace_s=0), [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.start()
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            service = Service(servicer, server, channel, EncoderStub(channel), 0)
            await service.load()
            service.idle_tasks = len(asyncio.all_tasks())
            yield service
            await service.until_idle()
    finally:
        await server.stop()
        await servicer.stop()


def make_slots(vision: Vision, config: EncoderConfig) -> TileSlots | None:
    if not config.tile_ring_mib:
        return None
    tile_bytes = vision.preprocessing.tokens_per_tile * vision.hidden_size * vision.dtype.itemsize
    return TileSlots.create(config.tile_ring_mib << 20, tile_bytes, CPU_SLOTS)


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.002)


def gradient(seed: int = 0, width: int = 4 * SIDE, height: int = 3 * SIDE, format: str = "PNG") -> bytes:
    """A picture of `format` whose tiles differ; 4 x 3 of them by default, and a thumbnail."""
    picture = Image.linear_gradient("L").resize((width, height)).rotate(17 * seed)
    file = io.BytesIO()
    Image.merge("RGB", (picture, picture.rotate(90), picture.rotate(45))).save(file, format)
    return file.getvalue()


def corrupt_pixels(picture: bytes) -> bytes:
    """A JPEG with valid headers, that of its scan included, and no usable pixels behind them."""
    scan = picture.index(b"\xff\xda")
    length = int.from_bytes(picture[scan + 2 : scan + 4], "big")
    return picture[: scan + 2 + length]


def opening(pictures: Sequence[bytes], **fields: Any) -> encoder_pb2.EncodeRequest:
    """A valid Open of these pictures, but for `fields`."""
    values: dict[str, Any] = {
        "media": [
            encoder_pb2.Medium(kind=encoder_pb2.MEDIA_KIND_IMAGE, num_bytes=len(data)) for data in pictures
        ],
        "payload_dtypes": [tensor_pb2.DTYPE_BFLOAT16, tensor_pb2.DTYPE_FLOAT32],
        "transports": [encoder_pb2.TRANSPORT_INLINE],
    }
    return encoder_pb2.EncodeRequest(open=encoder_pb2.Open(**values | fields))


def chunk(medium: int, data: bytes) -> encoder_pb2.EncodeRequest:
    return encoder_pb2.EncodeRequest(chunk=encoder_pb2.MediaChunk(medium=medium, data=data))


def grant(*ranges: tuple[int, int, int]) -> encoder_pb2.EncodeRequest:
    """(medium, first tile, number of tiles), ..."""
    tiles = [encoder_pb2.TileRange(medium=m, first_tile=first, num_tiles=n) for m, first, n in ranges]
    return encoder_pb2.EncodeRequest(grant=encoder_pb2.Grant(tiles=tiles))


async def send(call: EncodeCall, *messages: encoder_pb2.EncodeRequest) -> None:
    for message in messages:
        await call.write(message)


async def start(
    service: Service, pictures: Sequence[bytes], stub: EncoderStub | None = None, **fields: Any
) -> EncodeCall:
    """A stream whose pictures are uploaded and whose layout is still to be read."""
    call: EncodeCall = (stub or service.stub).Encode(timeout=TIMEOUT_S)
    await send(call, opening(pictures, **fields))
    await send(call, *(chunk(index, data) for index, data in enumerate(pictures)))
    return call


async def read_layout(call: EncodeCall) -> encoder_pb2.Layout:
    event = await call.read()
    assert isinstance(event, encoder_pb2.EncodeResponse) and event.WhichOneof("event") == "layout"
    return event.layout


@dataclass
class Answer:
    """What came after the layout."""

    tiles: list[tuple[int, int]] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    heartbeats: list[encoder_pb2.Heartbeat] = field(default_factory=list)
    timings: encoder_pb2.EncodeTimings | None = None

    async def read(self, call: EncodeCall, num_tiles: int) -> None:
        """Until that many tiles are there."""
        while len(self.tiles) < num_tiles:
            self.add(await call.read())

    async def read_all(self, call: EncodeCall) -> Answer:
        """Until the end of the stream; raises grpc.RpcError where that is an error."""
        while (event := await call.read()) is not grpc.aio.EOF:
            assert self.timings is None, "Done is the last message"
            self.add(event)
        return self

    def add(self, event: Any) -> None:
        if isinstance(event, TileFrame):
            self.tiles.append((event.tile.medium, event.tile.tile))
            self.payloads.append(bytes(event.payload))
        elif event.WhichOneof("event") == "heartbeat":
            self.heartbeats.append(event.heartbeat)
        else:
            assert event.WhichOneof("event") == "done", event
            self.timings = event.done.timings


async def finish(call: EncodeCall) -> Answer:
    """Half-close and read the rest."""
    await call.done_writing()
    return await Answer().read_all(call)
