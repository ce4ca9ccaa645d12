"""One Encode call: pictures and grants out, layout and tiles in, and whether the encoder is still alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc
import torch

from llm_service.call_ending import CallEnding
from llm_service.config import EncoderPoolConfig
from llm_service.encode_requests import chunk_requests, grant_request, open_request
from llm_service.encoder_pool import EncoderConnection
from llm_service.picture import PartGrid, Picture, PictureLayout, TileId
from protos import encoder_pb2, tensor_pb2
from protos.encoder_rpc import EncodeCall
from protos.errors import Cancelled, DeadlineExceeded, InvalidRequest, ModelError, ServingError, Unavailable
from protos.frames import EncodeEvent, TileFrame
from protos.options import MAX_FETCH_S
from protos.quantized import dequantize, payload_bytes
from protos.request_context import Metadata
from protos.ring import RingReader
from protos.statuses import error_from_rpc, write_failed
from protos.tensors import TensorFormatError, dtype_from_proto, tensor_from_bytes

PAYLOAD_DTYPES = (tensor_pb2.DTYPE_BFLOAT16, tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_FLOAT32)
TICK_S = 0.1
# A network that moves less is taken for one that has failed.
MIN_UPLOAD_BYTES_S = 8 << 20
# To begin and to end.
FETCH_WAIT_S = 2 * MAX_FETCH_S
HASH_BYTES = 32

log = logging.getLogger(__name__)

# Returns slots without granting tiles.
RETURN = TileId(-1, -1)
# Times the heartbeat's timeout: one that starves on a busy machine comes back, and nobody else is there.
LONE_PATIENCE = 10


@dataclass(frozen=True)
class ArrivedTile:
    tile: TileId
    embeds: torch.Tensor  # [num_tokens, hidden_size], valid until the next tile is asked for
    # Asked once `embeds` have been copied: False where the encoder overwrote them, as it may when it has
    # ended the stream, which then says why; the tile counts as not come.
    is_whole: Callable[[], bool]


class EncodeStream:
    """Open, read, close; a failed one is thrown away.  Transport failures are raised as Unavailable."""

    def __init__(
        self,
        connection: EncoderConnection,
        config: EncoderPoolConfig,
        pictures: Sequence[Picture],
        hidden_size: int,
        has_substitute: Callable[[], bool] = lambda: True,
    ) -> None:
        """`has_substitute` says whether another encoder could do the same now."""
        self.connection = connection
        self.is_open = False
        self._config = config
        self._pictures = pictures
        self._hidden_size = hidden_size
        self._has_substitute = has_substitute
        self._granted: asyncio.Queue[TileId | None] = asyncio.Queue()  # None: half-close
        self._read_slots: list[int] = []  # that go back to the encoder with the next message
        self._is_reading = False  # our caller, the tile that came last
        self._due: set[TileId] = set()  # granted or credited, not here yet
        self._ring: RingReader | None = None
        self._layouts: list[PictureLayout] = []
        quantized = (tensor_pb2.DTYPE_FLOAT8_E4M3,) if config.tile_payload == "fp8" else ()
        self._payload_dtypes = (*PAYLOAD_DTYPES, *quantized)  # the fingerprint says which of them we mean
        self._dtype = torch.float32
        self._call: EncodeCall | None = None
        self._ending = CallEnding()
        self._watchdog: asyncio.Task[None] | None = None
        self._verdict: ServingError | None = None
        self._heard = True
        self._is_waiting: Callable[[], bool] = bool
        self._last_tile_s = 0.0
        connection.streams_open += 1
        self._closed = False

    async def open(
        self, metadata: Metadata, cache_salt: bytes, priority: int, initial_credit: int
    ) -> list[PictureLayout]:
        """Send the pictures; returns their layouts.

        Raises:
            ServingError: what the encoder refused; Unavailable when it does not answer properly.
        """
        self._ring = self.connection.ring
        request = open_request(
            self._pictures,
            self._payload_dtypes,
            metadata,
            cache_salt,
            priority,
            initial_credit,
            b"" if self._ring is None else self._ring.nonce,
        )
        self._call = self.connection.stub.Encode(self._requests(request), metadata=metadata)
        self._call.add_done_callback(self._ending.note)
        try:
            async with asyncio.timeout(self._layout_timeout_s):
                event = await self._read()
        except TimeoutError:
            raise Unavailable("the encoder did not read the pictures' headers in time") from None
        if not isinstance(event, encoder_pb2.EncodeResponse) or event.WhichOneof("event") != "layout":
            raise Unavailable("the encoder broke the protocol: no layout")
        self._accept_layout(event.layout)
        self._due = set(self._tile_ids()[:initial_credit])
        self.is_open = True
        self._last_tile_s = time.monotonic()
        self._watchdog = asyncio.create_task(self._watch())
        return self._layouts

    def grant(self, tiles: Sequence[TileId]) -> None:
        """Ask for tiles; those that the initial credit or an earlier grant covers come anyway."""
        missing = [tile for tile in tiles if tile not in self._due]
        if missing:
            self._due.update(missing)
            for tile in missing:
                self._granted.put_nowait(tile)

    @property
    def num_due(self) -> int:
        """Tiles that were granted or credited and have not come."""
        return len(self._due)

    @property
    def has_given_up(self) -> bool:
        """It was our watchdog that ended the stream."""
        return self._verdict is not None

    def half_close(self) -> None:
        """Nothing more will be granted on this stream."""
        if self.is_open:
            self.is_open = False
            self._granted.put_nowait(None)

    async def tiles(self, is_waiting: Callable[[], bool]) -> AsyncIterator[ArrivedTile]:
        """Yield tiles until Done; `is_waiting` says whether one is missed.

        Raises:
            Unavailable: the encoder is gone, silent, or sends what was not asked for.
            DeadlineExceeded: it lives, but no tile comes.
        """
        self._is_waiting = is_waiting
        while True:
            event = await self._read()
            for frame in _frames(event):
                self._is_reading = True
                yield self._accept_tile(frame)
                self._is_reading = False
                if frame.tile.HasField("slot"):
                    self._read_slots.append(frame.tile.slot)
            if self._read_slots or self._has_all:
                self._granted.put_nowait(RETURN)
            if isinstance(event, encoder_pb2.EncodeResponse) and event.WhichOneof("event") == "done":
                if self.is_open or self._due:
                    raise Unavailable("the encoder was done too early")
                return

    def close(self) -> None:
        """Synchronous and idempotent; the encoder drops what it still holds for us."""
        if self._closed:
            return
        self._closed = True
        self.is_open = False
        self.connection.streams_open -= 1
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        # Where the call has ended by itself, cancelling it does not wake the task that sends our messages.
        self._granted.put_nowait(None)
        if self._call is not None:
            self._call.cancel()
        self._ring = None

    @property
    def _layout_timeout_s(self) -> float:
        """The media have to get there first, and those of a stream may be 100 MiB."""
        num_bytes = sum(len(picture.data) for picture in self._pictures)
        fetch_s = FETCH_WAIT_S if any(picture.url for picture in self._pictures) else 0.0
        return self._config.layout_timeout_s + num_bytes / MIN_UPLOAD_BYTES_S + fetch_s

    async def _requests(self, opening: encoder_pb2.EncodeRequest) -> AsyncIterator[encoder_pb2.EncodeRequest]:
        yield opening
        for chunk in chunk_requests(self._pictures):
            yield chunk
        while (tiles := await self._next_granted()) is not None:
            slots = self._take_read_slots()
            if tiles or slots:
                yield grant_request(tiles, slots)
        # Half-closed: what is not returned by the stream's end could be overwritten while we read it.
        while self._ring is not None and not (self._has_all and not self._read_slots):
            if self._read_slots:
                yield grant_request([], self._take_read_slots())
            else:
                await self._granted.get()

    def _take_read_slots(self) -> list[int]:
        slots, self._read_slots = self._read_slots, []
        return slots

    @property
    def _has_all(self) -> bool:
        """Nothing is to come any more, and nothing is being read."""
        return not (self.is_open or self._due or self._is_reading)

    async def _next_granted(self) -> list[TileId] | None:
        """All that was granted since the last message: a step of the engine costs one.  None at the end."""
        tiles: list[TileId] = []
        tile = await self._granted.get()
        while tile is not None:
            if tile is not RETURN:
                tiles.append(tile)
            if self._granted.empty():
                return tiles
            tile = self._granted.get_nowait()
        self._granted.put_nowait(None)  # for the next time
        return tiles or None

    async def _read(self) -> EncodeEvent:
        assert self._call is not None
        try:
            event = await self._call.read()
        except grpc.RpcError as error:
            raise self._failure(error) from error
        except asyncio.CancelledError:
            # The watchdog cancels the call, which looks like a cancellation of our own task.
            if self._verdict is None or _is_task_cancelled():
                raise
            raise self._verdict from None
        self._heard = True
        if not isinstance(event, encoder_pb2.EncodeResponse | TileFrame):  # grpc.aio.EOF
            raise Unavailable("the encoder ended the stream too early")
        return event

    def _failure(self, rpc_error: grpc.RpcError) -> ServingError:
        if self._verdict is not None:
            return self._verdict
        end = self._ending.error or rpc_error
        if end.code() is grpc.StatusCode.OK or write_failed(end):
            return Unavailable("the encoder ended the stream too early")
        error = error_from_rpc(end)
        if isinstance(error, Cancelled | Unavailable | ModelError):  # gRPC's own words may name addresses
            log.warning("encoder %s: %s", self.connection.target, error.message)
            if isinstance(error, ModelError):
                return ModelError("the encoder failed; see its log")
            return Unavailable("the encoder is gone", retry_after_s=1.0)
        if isinstance(error, InvalidRequest) and not (error.field or "").startswith("media"):
            # Of our messages, not of what the caller sent.
            log.error("encoder %s refuses %s: %s", self.connection.target, error.field, error.message)
            return ModelError("the encoder and this service do not understand each other; see the log")
        return error

    def _accept_layout(self, layout: encoder_pb2.Layout) -> None:
        if len(layout.media) != len(self._pictures) or not all(
            map(_is_hash_of, layout.media, self._pictures)
        ):
            raise Unavailable("the encoder laid out other pictures than it was sent")
        if layout.hidden_size != self._hidden_size or layout.dtype not in self._payload_dtypes:
            raise Unavailable("the encoder's visual tokens do not fit the language model")
        if self.connection.payload_dtype not in (None, layout.dtype):
            raise Unavailable("the encoder's visual tokens are of another type than it announced")
        if not all(medium.final and medium.tokens_per_tile for medium in layout.media):
            raise Unavailable("the encoder's layout is not final")
        if layout.transport == encoder_pb2.TRANSPORT_INLINE and self._ring is not None:
            self.connection.drop_ring()
            self._ring = None
        self._dtype = dtype_from_proto(layout.dtype)
        self._layouts = list(map(_picture_layout, layout.media, self._pictures))

    def _tile_ids(self) -> list[TileId]:
        return [
            TileId(medium, tile)
            for medium, layout in enumerate(self._layouts)
            for tile in range(len(layout.tokens_per_tile))
        ]

    def _accept_tile(self, frame: TileFrame) -> ArrivedTile:
        tile = TileId(frame.tile.medium, frame.tile.tile)
        if tile not in self._due:
            raise Unavailable("the encoder sent a tile that nobody asked for")
        try:
            embeds = self._embeds(tile, self._payload(frame, tile))
        except TensorFormatError:
            raise Unavailable("the encoder sent a malformed tile") from None
        self._due.remove(tile)
        self._last_tile_s = time.monotonic()
        return ArrivedTile(tile, embeds, partial(self._is_whole, frame.tile))

    def _payload(self, frame: TileFrame, tile: TileId) -> memoryview:
        """Where the tile's bytes are: in a slot of this stream, or in the message."""
        num_tokens = self._num_tokens(tile)
        if frame.tile.num_tokens != num_tokens:
            raise TensorFormatError(f"{frame.tile.num_tokens} tokens instead of {num_tokens}")
        if not frame.tile.HasField("slot"):
            return frame.payload
        num_bytes = payload_bytes(self._dtype, num_tokens, self._hidden_size)
        ring = self._ring
        if ring is None or frame.tile.slot >= ring.geometry.num_slots or num_bytes > ring.geometry.slot_bytes:
            raise TensorFormatError("the tile is in no slot of the encoder's ring")
        return ring.slot(frame.tile.slot)[:num_bytes]

    def _is_whole(self, tile: encoder_pb2.Tile) -> bool:
        if not tile.HasField("slot"):
            return True
        if self._ring is not None and self._ring.sequence(tile.slot) == tile.sequence:
            return True
        self._due.add(TileId(tile.medium, tile.tile))
        return False

    def _embeds(self, tile: TileId, payload: memoryview) -> torch.Tensor:
        num_tokens = self._num_tokens(tile)
        if self._dtype is torch.float8_e4m3fn:
            return dequantize(payload, num_tokens, self._hidden_size)
        return tensor_from_bytes(payload, self._dtype, (num_tokens, self._hidden_size))

    def _num_tokens(self, tile: TileId) -> int:
        return self._layouts[tile.medium].tokens_per_tile[tile.tile]

    async def _watch(self) -> None:
        """Give the encoder up when it is silent, or alive but without a tile for too long.

        Silence counts in ticks of our own loop: while that is busy, the encoder is not to blame.
        """
        silent_s = 0.0
        while self._verdict is None:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            silent_s = 0.0 if self._heard else silent_s + TICK_S
            self._heard = False
            if silent_s >= self._config.heartbeat_timeout_s and self._is_lost(silent_s):
                self._verdict = Unavailable("the encoder stopped answering", retry_after_s=1.0)
            elif not self._is_waiting():
                self._last_tile_s = now
            elif now - self._last_tile_s > self._config.tile_timeout_s:
                self._verdict = DeadlineExceeded("the encoder took too long for a tile")
        assert self._call is not None
        self._call.cancel()

    def _is_lost(self, silent_s: float) -> bool:
        return self._has_substitute() or silent_s >= LONE_PATIENCE * self._config.heartbeat_timeout_s


def _is_hash_of(medium: encoder_pb2.MediumLayout, picture: Picture) -> bool:
    if picture.url:
        return len(medium.content_hash) == HASH_BYTES
    return bool(medium.content_hash == picture.content_hash)


def _picture_layout(medium: encoder_pb2.MediumLayout, picture: Picture) -> PictureLayout:
    part_tiles = tuple(part.num_tiles for part in medium.parts)
    if part_tiles and (sum(part_tiles) != len(medium.tokens_per_tile) or 0 in part_tiles):
        raise Unavailable("the encoder's layout contradicts itself")
    fetched_hash = medium.content_hash if picture.url else b""
    return PictureLayout(tuple(medium.tokens_per_tile), part_tiles, fetched_hash, _grids(medium))


def _grids(medium: encoder_pb2.MediumLayout) -> tuple[PartGrid, ...]:
    if not medium.parts:
        num_tiles = len(medium.tokens_per_tile)
        return (
            PartGrid(
                medium.width, medium.height, medium.columns, medium.rows, medium.has_thumbnail, num_tiles
            ),
        )
    return tuple(
        PartGrid(
            part.width,
            part.height,
            part.columns,
            part.rows,
            part.has_thumbnail,
            part.num_tiles,
            part.timestamp_s,
        )
        for part in medium.parts
    )


def _frames(event: EncodeEvent) -> Sequence[TileFrame]:
    """The tiles that it brings."""
    if isinstance(event, TileFrame):
        return [event]
    return [TileFrame(tile, memoryview(b"")) for tile in event.tiles.tiles]


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
