"""What a client sends on an Encode stream, Open, bytes and grants, refused where it breaks a rule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from encoder_service.from_proto import AnnouncedMedium
from encoder_service.headers import HeaderReader
from encoder_service.media_fetcher import FetchBudget, MediaFetcher
from encoder_service.medium import Medium
from encoder_service.slot_lease import SlotLease
from encoder_service.tile_stream import MAX_WAITING_GRANTS, GrantedTile, TileStream
from protos import encoder_pb2, tensor_pb2
from protos.errors import DeadlineExceeded, FingerprintMismatch, InvalidRequest
from protos.options import MAX_CHUNK_BYTES

# More are joined on a thread: 100 MiB take tens of milliseconds, in which no stream gets a tile.
MAX_CHUNKS_JOINED_HERE = 4

Requests = AsyncIterator[encoder_pb2.EncodeRequest]


class StreamReader:
    """Reads any number of streams."""

    def __init__(
        self,
        upload_timeout_s: float,
        headers: HeaderReader,
        fingerprints: dict[tensor_pb2.DType, bytes],
        fetcher: MediaFetcher,
        max_stream_bytes: int,
    ) -> None:
        """`fingerprints` are those of the payload encodings that are offered; the first is the default."""
        self._upload_timeout_s = upload_timeout_s
        self._headers = headers
        self._fingerprints = fingerprints
        self._fetcher = fetcher
        self._max_stream_bytes = max_stream_bytes

    async def read_open(self, requests: Requests) -> tuple[encoder_pb2.Open, tensor_pb2.DType]:
        """The stream's opening, and how its tiles are to be encoded."""
        request = await self._next_request(requests)
        if request is None or request.WhichOneof("message") != "open":
            raise InvalidRequest("the first message must be open", field="open")
        opening = request.open
        payload_dtype = self._payload_dtype(opening)
        if encoder_pb2.TRANSPORT_INLINE not in opening.transports:
            raise InvalidRequest("transports must contain INLINE", field="transports")
        return opening, payload_dtype

    def _payload_dtype(self, opening: encoder_pb2.Open) -> tensor_pb2.DType:
        if opening.expected_fingerprint not in (b"", *self._fingerprints.values()):
            raise FingerprintMismatch("this encoder holds another checkpoint", field="expected_fingerprint")
        for dtype, fingerprint in self._fingerprints.items():
            if dtype in opening.payload_dtypes and opening.expected_fingerprint in (b"", fingerprint):
                return dtype
        raise InvalidRequest("payload_dtypes lacks this encoder's encoding", field="payload_dtypes")

    async def read_media(
        self,
        announced: Sequence[AnnouncedMedium],
        payload_dtype: tensor_pb2.DType,
        requests: Requests,
        add: Callable[[Medium], None],
    ) -> None:
        """Take or fetch the bytes and read the headers; `add` gets each medium in order, while others come.

        Raises:
            InvalidRequest: a medium is refused: the first that is, once all have come.
        """
        fingerprint = self._fingerprints[payload_dtype]
        budget = self._fetcher.budget(self._max_stream_bytes - sum(medium.num_bytes for medium in announced))
        adding: list[asyncio.Task[None]] = []
        try:
            for index, medium in enumerate(announced):
                # Called by the task: one that is cancelled before it begins would leave a coroutine behind.
                if medium.url:
                    read = partial(self._fetch, medium, budget, fingerprint, f"media[{index}].url")
                else:
                    data = await self._read_data(requests, index, medium.num_bytes)
                    read = partial(self._headers.read, medium, data, fingerprint, f"media[{index}].data")
                before = adding[-1] if adding else None
                adding.append(asyncio.create_task(_add_medium(read, before, add)))
            for task in adding:
                await task
        finally:
            for task in adding:
                task.cancel()
            await asyncio.gather(*adding, return_exceptions=True)

    async def _fetch(
        self, medium: AnnouncedMedium, budget: FetchBudget, fingerprint: bytes, field: str
    ) -> Medium:
        data = await self._fetcher.fetch(medium.url, medium.max_bytes, budget, field)
        return await self._headers.read(medium, data, fingerprint, field)

    async def _read_data(self, requests: Requests, medium: int, num_bytes: int) -> bytes:
        chunks: list[bytes] = []
        while num_bytes:
            chunks.append(await self._read_chunk(requests, medium, num_bytes))
            num_bytes -= len(chunks[-1])
        if len(chunks) > MAX_CHUNKS_JOINED_HERE:
            return await asyncio.to_thread(b"".join, chunks)  # which lets go of the interpreter's lock
        return b"".join(chunks)  # of one chunk no copy

    async def _read_chunk(self, requests: Requests, medium: int, room: int) -> bytes:
        """The next bytes of a medium, of which `room` are missing."""
        field = f"media[{medium}].data"
        request = await self._next_request(requests)
        if request is None or request.WhichOneof("message") != "chunk":
            raise InvalidRequest("the medium's bytes are incomplete", field=field)
        data = request.chunk.data
        if request.chunk.medium != medium:
            raise InvalidRequest(f"a chunk of medium {request.chunk.medium} came too early", field=field)
        if not 1 <= len(data) <= MAX_CHUNK_BYTES:
            raise InvalidRequest(
                f"a chunk has {len(data)} bytes, must be in [1, {MAX_CHUNK_BYTES}]", field=field
            )
        if len(data) > room:
            raise InvalidRequest("more bytes came than were announced", field=field)
        return data

    async def _next_request(self, requests: Requests) -> encoder_pb2.EncodeRequest | None:
        try:
            async with asyncio.timeout(self._upload_timeout_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded("the stream's upload stalled") from None


async def _add_medium(
    read: Callable[[], Awaitable[Medium]], before: asyncio.Task[None] | None, add: Callable[[Medium], None]
) -> None:
    medium = await read()
    if before is not None:
        await before
    add(medium)


async def read_grants(requests: Requests, tiles: TileStream, media: list[Medium], slots: SlotLease) -> None:
    """Feed grants and returned slots until the client half-closes."""
    try:
        async for request in requests:
            if request.WhichOneof("message") != "grant":
                raise InvalidRequest("only grants may follow the media", field="grant")
            slots.take_back(request.grant.slots)
            for number, granted in enumerate(request.grant.tiles):
                tiles.grant(_granted_tiles(granted, media, f"grant.tiles[{number}]"))
                if tiles.num_waiting > MAX_WAITING_GRANTS:
                    raise InvalidRequest(
                        f"more than {MAX_WAITING_GRANTS} granted tiles wait", field=f"grant.tiles[{number}]"
                    )
    except Exception as error:
        tiles.fail(error)
    else:
        slots.end_returns()
        tiles.end_grants()


def _granted_tiles(granted: encoder_pb2.TileRange, media: list[Medium], field: str) -> list[GrantedTile]:
    end = granted.first_tile + granted.num_tiles
    if granted.medium >= len(media) or not granted.num_tiles or end > media[granted.medium].num_tiles:
        raise InvalidRequest("no such tiles", field=field)
    return [GrantedTile(granted.medium, tile) for tile in range(granted.first_tile, end)]
