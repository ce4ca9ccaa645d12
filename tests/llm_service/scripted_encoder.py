"""An encoder on a real port that answers as a test scripts it, and the values its tiles have."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import torch

from llm_service.picture import Picture, TileId
from protos import encoder_pb2 as pb
from protos import tensor_pb2
from protos.encoder_rpc import add_encoder_servicer
from protos.errors import InvalidRequest, NotFound
from protos.fingerprint import content_hash
from protos.frames import EncodeEvent, TileFrame
from protos.media import FrameSampling, MediaKind
from protos.options import SHARED_OPTIONS
from protos.ring import PAGE_BYTES, Ring, RingGeometry
from protos.statuses import rpc_errors
from protos.tensors import tensor_bytes

FINGERPRINT = b"f" * 32
HIDDEN_SIZE = 1
TOKENS_PER_TILE = 4
HEARTBEAT_S = 0.2
NUM_SLOTS = 4

Context = grpc.aio.ServicerContext[Any, Any]


class FixedBase:
    """What a FingerprintBase is to the pool: ours, whatever dtypes an encoder has."""

    def fingerprint(self, compute_dtype: int, payload_dtype: int) -> bytes:
        return FINGERPRINT


def make_picture(data: bytes, min_tiles: int = 1, max_tiles: int = 12, use_thumbnail: bool = True) -> Picture:
    name = content_hash(data, min_tiles, max_tiles, use_thumbnail, FINGERPRINT)
    return Picture(data, min_tiles, max_tiles, use_thumbnail, name, FINGERPRINT)


def make_url_picture(url: str) -> Picture:
    return replace(make_picture(url.encode()), data=b"", url=url)


def tile_values(data: bytes, tile: int) -> torch.Tensor:
    """What the encoder makes of a tile: [TOKENS_PER_TILE, HIDDEN_SIZE] float32, no two tiles alike."""
    base = int.from_bytes(hashlib.sha256(data + bytes([tile])).digest()[:2], "little")
    values = base * 8 + torch.arange(TOKENS_PER_TILE * HIDDEN_SIZE)
    return values.view(TOKENS_PER_TILE, HIDDEN_SIZE).float()


KINDS = {
    pb.MEDIA_KIND_IMAGE: MediaKind.IMAGE,
    pb.MEDIA_KIND_VIDEO: MediaKind.VIDEO,
    pb.MEDIA_KIND_DOCUMENT: MediaKind.DOCUMENT,
}


@dataclass
class EncoderSide:
    """One Encode stream as the encoder sees it."""

    requests: AsyncIterator[pb.EncodeRequest]
    num_tiles: int
    fingerprint: bytes = FINGERPRINT
    metadata: dict[str, str] = field(default_factory=dict)
    opening: pb.Open = field(default_factory=pb.Open)
    media: list[bytearray] = field(default_factory=list)
    granted: list[TileId] = field(default_factory=list)
    grants: int = 0  # messages with tiles
    returned: list[int] = field(default_factory=list)  # slots
    is_half_closed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    web: dict[str, bytes] = field(default_factory=dict)  # what is there by URL
    ring: Ring | None = None

    async def read_pictures(self) -> None:
        self.opening = (await anext(self.requests)).open
        self.media = [bytearray() for _ in self.opening.media]
        for index, announced in enumerate(self.opening.media):
            if announced.url:
                self.media[index] += self.web[announced.url]
            while not announced.url and len(self.media[index]) < announced.num_bytes:
                chunk = (await anext(self.requests)).chunk
                assert chunk.medium == index
                self.media[index] += chunk.data

    def credited(self) -> list[TileId]:
        tiles = [TileId(medium, tile) for medium in range(len(self.media)) for tile in range(self.num_tiles)]
        return tiles[: self.opening.initial_credit]

    async def next_grant(self) -> list[TileId] | None:
        """No tiles where slots were only returned; None once the client has half-closed."""
        request = await anext(self.requests, None)
        if request is None:
            self.is_half_closed = True
            return None
        self.returned += request.grant.slots
        tiles = [
            TileId(tiles.medium, tiles.first_tile + offset)
            for tiles in request.grant.tiles
            for offset in range(tiles.num_tiles)
        ]
        self.grants += bool(tiles)
        self.granted += tiles
        return tiles

    def layout(self, **changes: Any) -> pb.EncodeResponse:
        media = [
            pb.MediumLayout(
                content_hash=content_hash(
                    bytes(data),
                    announced.tiling.min_tiles,
                    announced.tiling.max_tiles,
                    announced.tiling.use_thumbnail,
                    self.fingerprint,
                    KINDS[announced.kind],
                    sampling_of(announced),
                ),
                tokens_per_tile=[TOKENS_PER_TILE] * self.num_tiles,
                final=True,
                parts=[] if is_picture(announced) else [pb.PartLayout(num_tiles=1)] * self.num_tiles,
            )
            for data, announced in zip(self.media, self.opening.media, strict=True)
        ]
        fields: dict[str, Any] = {
            "media": media,
            "hidden_size": HIDDEN_SIZE,
            "dtype": tensor_pb2.DTYPE_FLOAT32,
            "transport": pb.TRANSPORT_INLINE,
        }
        return pb.EncodeResponse(layout=pb.Layout(**(fields | changes)))

    def tile(self, tile: TileId) -> TileFrame:
        payload = tensor_bytes(tile_values(bytes(self.media[tile.medium]), tile.tile))
        header = pb.Tile(medium=tile.medium, tile=tile.tile, num_tokens=TOKENS_PER_TILE)
        return TileFrame(header, payload)

    def tile_in_slot(self, tile: TileId, slot: int) -> pb.Tile:
        frame = self.tile(tile)
        frame.tile.slot, frame.tile.sequence = slot, self.overwrite(slot, frame.payload)
        return frame.tile

    def overwrite(self, slot: int, payload: bytes | memoryview) -> int:
        """The slot's sequence from here on."""
        assert self.ring is not None
        self.ring.advance(slot)
        self.ring.slot(slot)[: len(payload)] = payload
        return self.ring.sequence(slot)


def is_picture(medium: pb.Medium) -> bool:
    return medium.kind == pb.MEDIA_KIND_IMAGE


def sampling_of(medium: pb.Medium) -> FrameSampling | None:
    if medium.kind != pb.MEDIA_KIND_VIDEO:
        return None
    given = {descriptor.name: value for descriptor, value in medium.sampling.ListFields()}
    return FrameSampling(**given)


Script = Callable[[EncoderSide], AsyncIterator[EncodeEvent]]


def heartbeat() -> pb.EncodeResponse:
    return pb.EncodeResponse(heartbeat=pb.Heartbeat())


@contextmanager
def small_ring(is_wanted: bool) -> Iterator[Ring | None]:
    """Handed over by the running event loop."""
    if not is_wanted:
        yield None
        return
    ring, loop = Ring.create(RingGeometry(NUM_SLOTS, PAGE_BYTES)), asyncio.get_running_loop()
    loop.add_reader(ring.socket, ring.hand_over)
    try:
        yield ring
    finally:
        loop.remove_reader(ring.socket)
        ring.close()


def in_slots(*tiles: pb.Tile) -> pb.EncodeResponse:
    return pb.EncodeResponse(tiles=pb.TilesInSlots(tiles=tiles))


def done() -> pb.EncodeResponse:
    return pb.EncodeResponse(done=pb.Done())


async def honest(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    """Everything that is asked for, at once."""
    await side.read_pictures()
    yield side.layout()
    async for event in serve_grants(side, side.credited()):
        yield event


async def serve_grants(side: EncoderSide, first: list[TileId]) -> AsyncIterator[EncodeEvent]:
    for tile in first:
        yield side.tile(tile)
    while (granted := await side.next_grant()) is not None:
        for tile in granted:
            yield side.tile(tile)
    yield done()


async def hang() -> None:
    await asyncio.Event().wait()


def beating(script: Script) -> Script:
    """The script with a heartbeat whenever it says nothing for a while."""

    async def run(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
        events = aiter(script(side))
        following = asyncio.ensure_future(anext(events, None))
        is_laid_out = False
        try:
            while True:
                await asyncio.wait([following], timeout=HEARTBEAT_S)
                if not following.done():
                    if is_laid_out:
                        yield heartbeat()
                    continue
                event = following.result()
                if event is None:
                    return
                is_laid_out = True
                yield event
                following = asyncio.ensure_future(anext(events, None))
        finally:
            following.cancel()
            await asyncio.wait([following])

    return run


def refuses(error: Exception) -> Script:
    async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
        await side.read_pictures()
        raise error
        yield heartbeat()

    return script


WELL_BEHAVED = beating(honest)


class ScriptedEncoder:
    """Records its streams; all that is public may change at any time."""

    def __init__(self, script: Script = WELL_BEHAVED, num_tiles: int = 3, ring: Ring | None = None) -> None:
        self.script = script
        self.num_tiles = num_tiles
        self.fingerprint = FINGERPRINT
        self.tiles_queued = 0
        self.ring = ring
        self.gpu_uuid, self.batch_tiles, self.first_batch_tiles = "", 0, 0
        self.web: dict[str, bytes] = {}
        self.sides: list[EncoderSide] = []
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def Encode(
        self, requests: AsyncIterator[pb.EncodeRequest], context: Context
    ) -> AsyncIterator[EncodeEvent]:
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        side = EncoderSide(requests, self.num_tiles, self.fingerprint, metadata, web=self.web, ring=self.ring)
        self.sides.append(side)
        try:
            async with rpc_errors(context):
                async for event in self.script(side):
                    yield event
        finally:
            side.ended.set()

    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachResponse:
        async with rpc_errors(context):
            if self.ring is None:
                raise NotFound("this encoder shares no memory")
            geometry = self.ring.geometry
            return pb.AttachResponse(
                name=self.ring.name, num_slots=geometry.num_slots, slot_bytes=geometry.slot_bytes
            )
        raise AssertionError("rpc_errors ends the call")

    async def GetModel(
        self, request: pb.GetEncoderModelRequest, context: Context
    ) -> pb.GetEncoderModelResponse:
        return pb.GetEncoderModelResponse(
            fingerprint=self.fingerprint,
            compute_dtype=tensor_pb2.DTYPE_FLOAT32,
            payload_dtype=tensor_pb2.DTYPE_FLOAT32,
            hidden_size=HIDDEN_SIZE,
            tokens_per_tile=TOKENS_PER_TILE,
            tiles_queued=self.tiles_queued,
            gpu_uuid=self.gpu_uuid,
            batch_tiles=self.batch_tiles,
            first_batch_tiles=self.first_batch_tiles,
        )

    async def listen(self) -> None:
        """On the port it had, if it had one."""
        self._server = grpc.aio.server(options=[*SHARED_OPTIONS, ("grpc.so_reuseport", 0)])
        add_encoder_servicer(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


@asynccontextmanager
async def encoders(*scripted: ScriptedEncoder) -> AsyncIterator[list[str]]:
    """The encoders listening; gives their targets."""
    for encoder in scripted:
        await encoder.listen()
    try:
        yield [encoder.target for encoder in scripted]
    finally:
        for encoder in scripted:
            await encoder.stop()


def bad_medium(index: int, message: str = "not an image") -> InvalidRequest:
    return InvalidRequest(message, field=f"media[{index}].data")
