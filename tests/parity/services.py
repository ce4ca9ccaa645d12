"""The services on loopback: their own entry points, real gRPC, and an engine that can be watched."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from encoder_service.config import CPU_SLOTS, EncoderConfig
from encoder_service.media_fetcher import MediaFetcher
from encoder_service.servicer import EncoderServicer
from encoder_service.tile_slots import TileSlots
from encoder_service.vision import VisionEncoder
from llm_service.config import EncoderPoolConfig, EngineConfig, LLMConfig
from llm_service.engine_host import EngineHost
from llm_service.messages import EngineReady
from llm_service.process import serve
from protos import encoder_pb2, language_model_pb2_grpc
from protos import language_model_pb2 as pb
from protos.channel import ClientTlsConfig, open_channel
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.frames import EncodeEvent, TileFrame
from protos.server import Server, ServerConfig
from tests.parity.local_pair import LocalEngine
from tests.parity.scenarios import Scenario

HEARTBEAT_S = 0.1
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[encoder_pb2.EncodeRequest]


def one_tile_each(event: EncodeEvent) -> list[EncodeEvent]:
    if isinstance(event, TileFrame) or event.WhichOneof("event") != "tiles":
        return [event]
    tiles = [encoder_pb2.TilesInSlots(tiles=[tile]) for tile in event.tiles.tiles]
    return [encoder_pb2.EncodeResponse(tiles=tile) for tile in tiles]


def tile_of(event: EncodeEvent) -> encoder_pb2.Tile | None:
    if isinstance(event, TileFrame):
        return event.tile
    return event.tiles.tiles[0] if event.tiles.tiles else None


class ScriptedEncoder:
    """The real servicer; a script says when its tiles leave.  Counts calls and tiles."""

    def __init__(self, servicer: EncoderServicer, port: int, server: Server) -> None:
        self.target = f"127.0.0.1:{port}"
        self.num_calls = 0
        self.num_tiles = 0
        self.withheld_tile: int | None = None  # number inside its picture
        self.is_withholding = asyncio.Event()
        self.release = asyncio.Event()
        self.max_delay_s = 0.0  # before each tile
        self._random = random.Random(5)
        self._servicer = servicer
        self._server = server

    async def Encode(self, requests: Requests, context: Context) -> AsyncIterator[EncodeEvent]:
        self.num_calls += 1
        async for joined in self._servicer.Encode(requests, context):
            for event in one_tile_each(joined):
                tile = tile_of(event)
                if tile is not None:
                    self.num_tiles += 1
                    if tile.tile == self.withheld_tile:
                        async for heartbeat in self._withhold():
                            yield heartbeat
                    await asyncio.sleep(self._random.uniform(0, self.max_delay_s))
                yield event

    async def Attach(
        self, request: encoder_pb2.AttachRequest, context: Context
    ) -> encoder_pb2.AttachResponse:
        return await self._servicer.Attach(request, context)

    async def GetModel(
        self, request: encoder_pb2.GetEncoderModelRequest, context: Context
    ) -> encoder_pb2.GetEncoderModelResponse:
        return await self._servicer.GetModel(request, context)

    async def die(self) -> None:
        """Every stream breaks and nobody answers any more."""
        await self._server.stop()

    async def _withhold(self) -> AsyncIterator[encoder_pb2.EncodeResponse]:
        """Alive, but the tile does not come."""
        self.is_withholding.set()
        while not self.release.is_set():
            yield encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat())
            with suppress(TimeoutError):
                await asyncio.wait_for(self.release.wait(), HEARTBEAT_S)


@asynccontextmanager
async def running_encoder(
    folder: Path, fetcher: MediaFetcher | None = None
) -> AsyncIterator[ScriptedEncoder]:
    config = EncoderConfig(model=str(folder), server=ServerConfig(shutdown_grace_s=0), device="cpu")
    checkpoint = open_checkpoint(config.model)
    vision = VisionEncoder.load(checkpoint, "cpu")
    tile_bytes = vision.config.tokens_per_tile * vision.hidden_size * vision.dtype.itemsize
    slots = TileSlots.create(1 << 20, tile_bytes, CPU_SLOTS)
    servicer = EncoderServicer(config, FingerprintBase(checkpoint), vision, fetcher=fetcher, slots=slots)
    server = Server(config.server, [SERVICE_NAME])
    encoder = ScriptedEncoder(servicer, 0, server)
    add_encoder_servicer(encoder, server.grpc)
    servicer.start()
    encoder.target = f"127.0.0.1:{await server.start()}"
    await server.set_serving()
    try:
        yield encoder
    finally:
        await server.stop()
        await servicer.stop()


@dataclass
class Answer:
    """What one Generate call said."""

    token_ids: list[list[int]]  # by choice
    texts: list[str]
    usage: pb.Usage = field(default_factory=pb.Usage)


class LanguageModel:
    def __init__(self, target: str, channel: grpc.aio.Channel) -> None:
        self.target = target
        self.stub = language_model_pb2_grpc.LanguageModelStub(channel)

    async def ask(
        self,
        scenario: Scenario,
        max_tokens: int,
        *,
        n: int = 1,
        cache_salt: bytes = b"",
        priority: int = 0,
    ) -> Answer:
        """Stream one request to its end."""
        request = scenario.request(max_tokens, n=n)
        request.cache_salt = cache_salt
        request.priority = priority
        answer = Answer([[] for _ in range(n)], [""] * n)
        async for event in self.stub.Generate(request, timeout=ANSWER_TIMEOUT_S):
            kind = event.WhichOneof("event")
            if kind == "delta":
                answer.token_ids[event.delta.index] += event.delta.token_ids
                answer.texts[event.delta.index] += event.delta.text
            elif kind == "usage":
                answer.usage = event.usage
        return answer


@asynccontextmanager
async def running_language_model(
    folder: Path,
    encoders: tuple[str, ...],
    engine: EngineConfig | None = None,
    engine_socket: Path | None = None,
    initial_credit: int = 4,
) -> AsyncIterator[LanguageModel]:
    """`serve` itself; it joins the engine at `engine_socket` or starts processes of its own."""
    config = LLMConfig(
        model=str(folder),
        server=ServerConfig(shutdown_grace_s=0),
        encoder_pool=EncoderPoolConfig(encoders=encoders, initial_credit=initial_credit),
        engine=engine or EngineConfig(device="cpu", num_threads=1, kv_cache_gib=0.01),
        engine_socket=str(engine_socket or ""),
    )
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(config, port.set_result))
    try:
        await asyncio.wait((serving, port), timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        target = f"127.0.0.1:{port.result()}"
        async with open_channel(target, ClientTlsConfig()) as channel:
            yield LanguageModel(target, channel)
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


@contextmanager
def hosted(engine: LocalEngine, folder: Path) -> Iterator[Path]:
    """The engine's own event loop on a thread of this process; yields the socket where it listens."""
    path = folder / "engine.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(4)
    capacity, pair = engine.capacity, engine.pair
    ready = EngineReady(
        max_model_len=capacity.max_model_len,
        vocab_size=pair.model_config.vocab_size,
        hidden_size=pair.model_config.hidden_size,
        dtype="float32",
        num_slots=capacity.num_slots,
        slot_tokens=capacity.slot_tokens,
        num_blocks=capacity.num_blocks,
        block_size=pair.backend.block_size,
        language_digest=pair.language_digest,
    )
    host = EngineHost(engine.engine, listener, ready, engine.memory.fd, max_waiting=64)
    thread = threading.Thread(target=host.run, name="engine")
    thread.start()
    try:
        yield path
    finally:
        host.stop()
        thread.join()
        listener.close()
        path.unlink()
