"""Encoder of the contract: protobuf in, protobuf out, and the life of the service's process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import torch

from encoder_service import metrics
from encoder_service.batcher import TileBatcher
from encoder_service.config import EncoderConfig
from encoder_service.containers import Containers
from encoder_service.decode_job import StoredPart
from encoder_service.from_proto import AnnouncedMedium, media_from_proto
from encoder_service.media import ImageHeader, read_header
from encoder_service.medium import Medium, Part
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_stream import FinishedTile, GrantedTile, TileStream, TileWorkers
from encoder_service.tiling import TilePlan, plan_tiles
from encoder_service.vision import VisionEncoder
from protos import encoder_pb2
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.errors import DeadlineExceeded, FingerprintMismatch, InvalidRequest, Overloaded
from protos.fingerprint import FingerprintBase, content_hash
from protos.frames import EncodeEvent, TileFrame
from protos.media import FrameSampling, MediaKind
from protos.options import HEARTBEAT_INTERVAL_S, MAX_CHUNK_BYTES
from protos.preprocessing import Preprocessing
from protos.server import Server, shutdown_signal
from protos.statuses import rpc_errors
from protos.tensors import dtype_to_proto, tensor_bytes

if TYPE_CHECKING:
    from encoder_service.cuda_vision import CudaVision

RETRY_AFTER_S = 1.0
# Tiles granted and not yet cut, of one stream: several times what the largest layout has.
MAX_WAITING_GRANTS = 16_384

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[encoder_pb2.EncodeRequest]


class Vision(Protocol):
    """Tiles to visual embeddings: a VisionEncoder, or what stands in for it in a transport benchmark."""

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [num_tiles, 3, S, S] -> [num_tiles, tokens_per_tile, hidden_size] on the host"""


class EncoderServicer:
    """Encode, GetModel.

    A stream ends when its upload stalls and when it has no tile to come and grants none for
    `idle_timeout_s`. A client that stays connected and does not read is not covered: grpc.aio blocks inside
    the `yield` of an event, in flow control, where no deadline of ours runs. Such a stream keeps its place
    among `max_streams` and what is cut ahead until its client or its connection goes.
    """

    def __init__(
        self, config: EncoderConfig, base: FingerprintBase, vision: Vision, gpu: CudaVision | None = None
    ) -> None:
        """With `gpu`, tiles are made and forwards are queued there, and nothing calls `vision.encode`."""
        self._config = config
        self._preprocessing = vision.preprocessing
        self._hidden_size = vision.hidden_size
        self._dtype = dtype_to_proto(vision.dtype)
        self._fingerprint = base.fingerprint(self._dtype, self._dtype)
        batch_tiles = config.batch_tiles("cpu" if gpu is None else "cuda")
        self._batcher = TileBatcher(
            vision.encode,
            batch_tiles,
            launch=None if gpu is None else gpu.launch,
            first_batch_tiles=None if gpu is None else config.first_batch_tiles,
        )
        self._cache = TileCache(
            config.host_cache_mib << 20,
            0 if gpu is None else config.device_cache_mib << 20,
            to_host=None if gpu is None else gpu.to_host,
        )
        self._workers = TileWorkers(
            flights=TileFlights(self._batcher, self._cache),
            pixels=PixelBudget(config.pixel_budget_mib << 20),
            threads=ThreadPoolExecutor(config.decode_workers, thread_name_prefix="decode"),
            image_size=self._preprocessing.image_size,
            image_limits=config.image_limits,
            containers=Containers(config.container_limits),
            batch_tiles=batch_tiles,
            make_tiles=gpu.make_tiles if gpu is not None and gpu.makes_pillows_tiles else None,
        )
        # A checkpoint whose own default is larger must stay usable with it.
        self._max_tiles = max(config.max_tiles, self._preprocessing.max_tiles)
        self._stream_ids = count()
        self._streams_open = 0

    def watch_load(self) -> None:
        """Let this process's metrics show the load of this servicer."""
        metrics.TILES_QUEUED.set_function(lambda: self._batcher.tiles_queued)
        metrics.FORWARDS.set_function(lambda: self._batcher.forwards_done)
        metrics.STREAMS_OPEN.set_function(lambda: self._streams_open)
        metrics.PIXEL_BYTES.set_function(lambda: self._workers.pixels.used_bytes)
        metrics.watch_tiles(self._cache, self._workers.flights)

    def close(self) -> None:
        self._batcher.close()
        self._cache.close()
        self._workers.containers.close()
        self._workers.threads.shutdown(cancel_futures=True)

    async def Encode(self, requests: Requests, context: Context) -> AsyncIterator[EncodeEvent]:
        start = time.monotonic_ns()
        self._streams_open += 1
        try:
            async with rpc_errors(context):
                self._refuse_overload()
                opening = await self._read_open(requests)
                announced = media_from_proto(opening.media, self._config, self._preprocessing)
                media: list[Medium] = []
                tiles = TileStream(
                    next(self._stream_ids), media, self._workers, opening.priority, opening.cache_salt
                )
                grants: asyncio.Task[None] | None = None
                try:
                    await self._read_media(
                        announced, requests, partial(_add, media, tiles, opening.initial_credit)
                    )
                    log.debug("%s: %d media", opening.request_id, len(media))
                    yield encoder_pb2.EncodeResponse(layout=self._layout(media))
                    grants = asyncio.create_task(_read_grants(requests, tiles, media))
                    while (event := await self._next_event(tiles)) is not None:
                        yield event
                finally:
                    if grants is not None:
                        grants.cancel()
                    await tiles.close()
                    # Here, for a caller that has its tiles may be gone before it has heard that this is all.
                    if tiles.timings.encode_ns:
                        metrics.observe(tiles.timings)
                yield _done(tiles, time.monotonic_ns() - start)
        finally:
            self._streams_open -= 1

    async def GetModel(
        self, request: encoder_pb2.GetEncoderModelRequest, context: Context
    ) -> encoder_pb2.GetEncoderModelResponse:
        limits, preprocessing = self._config.image_limits, self._preprocessing
        containers = self._config.container_limits
        return encoder_pb2.GetEncoderModelResponse(
            model=self._config.model,
            fingerprint=self._fingerprint,
            compute_dtype=self._dtype,
            payload_dtype=self._dtype,
            hidden_size=self._hidden_size,
            tokens_per_tile=preprocessing.tokens_per_tile,
            tiling=encoder_pb2.TilingOptions(
                min_tiles=preprocessing.min_tiles,
                max_tiles=preprocessing.max_tiles,
                use_thumbnail=preprocessing.use_thumbnail,
            ),
            max_tiles=self._max_tiles,
            max_media=self._config.max_media,
            max_media_bytes=limits.max_bytes,
            max_pixels=limits.max_pixels,
            max_video_bytes=containers.max_video_bytes,
            max_video_frames=containers.max_video_frames,
            max_document_bytes=containers.max_document_bytes,
            max_pages=containers.max_pages,
            tiles_queued=self._batcher.tiles_queued,
            streams_open=self._streams_open,
        )

    def _refuse_overload(self) -> None:
        """What streams hold in memory is bounded one by one, so their number must be."""
        if self._streams_open > self._config.max_streams:
            raise Overloaded(
                f"{self._config.max_streams} streams are open already", retry_after_s=RETRY_AFTER_S
            )

    async def _read_open(self, requests: Requests) -> encoder_pb2.Open:
        request = await self._next_request(requests)
        if request is None or request.WhichOneof("message") != "open":
            raise InvalidRequest("the first message must be open", field="open")
        opening = request.open
        if opening.expected_fingerprint not in (b"", self._fingerprint):
            raise FingerprintMismatch("this encoder holds another checkpoint", field="expected_fingerprint")
        if self._dtype not in opening.payload_dtypes:
            raise InvalidRequest("payload_dtypes lacks this encoder's encoding", field="payload_dtypes")
        if encoder_pb2.TRANSPORT_INLINE not in opening.transports:
            raise InvalidRequest("transports must contain INLINE", field="transports")
        return opening

    async def _read_media(
        self, announced: Sequence[AnnouncedMedium], requests: Requests, add: Callable[[Medium], None]
    ) -> None:
        """Take the chunks and read the headers; `add` gets each medium in order, while the next one comes.

        Raises:
            InvalidRequest: a medium is refused: the first that is, once all have come.
        """
        adding: list[asyncio.Task[None]] = []
        try:
            for index, medium in enumerate(announced):
                data = await self._read_data(requests, index, medium.num_bytes)
                read = self._read_header(f"media[{index}].data", medium, data)
                before = adding[-1] if adding else None
                adding.append(asyncio.create_task(_add_medium(read, before, add)))
            for task in adding:
                await task
        finally:
            for task in adding:
                task.cancel()
            await asyncio.gather(*adding, return_exceptions=True)

    async def _read_data(self, requests: Requests, medium: int, num_bytes: int) -> bytes:
        chunks: list[bytes] = []
        while num_bytes:
            chunks.append(await self._read_chunk(requests, medium, num_bytes))
            num_bytes -= len(chunks[-1])
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

    async def _read_header(self, field: str, announced: AnnouncedMedium, data: bytes) -> Medium:
        if announced.kind is MediaKind.IMAGE:
            return await self._workers.in_thread(partial(self._read_picture, field, announced, data))
        sampling = announced.sampling or FrameSampling()
        format, stored = await self._workers.containers.open(announced.kind, data, sampling, field)
        parts = [Part(part.width, part.height, self._plan(announced, part), part) for part in stored]
        digest = await self._workers.in_thread(partial(self._content_hash, announced, data))
        return Medium.container(announced.kind, format, data, digest, parts)

    def _read_picture(self, field: str, announced: AnnouncedMedium, data: bytes) -> Medium:
        header = read_header(data, self._config.image_limits, field)
        part = Part(header.width, header.height, self._plan(announced, header))
        return Medium.picture(data, self._content_hash(announced, data), part, header.decode_bytes)

    def _plan(self, announced: AnnouncedMedium, part: ImageHeader | StoredPart) -> TilePlan:
        return plan_tiles(part.width, part.height, announced.tiling, self._preprocessing.image_size)

    def _content_hash(self, announced: AnnouncedMedium, data: bytes) -> bytes:
        tiling = announced.tiling
        return content_hash(
            data,
            tiling.min_tiles,
            tiling.max_tiles,
            tiling.use_thumbnail,
            self._fingerprint,
            announced.kind,
            announced.sampling,
        )

    async def _next_request(self, requests: Requests) -> encoder_pb2.EncodeRequest | None:
        try:
            async with asyncio.timeout(self._config.upload_timeout_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded("the stream's upload stalled") from None

    async def _next_event(self, tiles: TileStream) -> EncodeEvent | None:
        """The next tile, a heartbeat when none came for a while, None at the end.

        Raises:
            DeadlineExceeded: the client has all that it granted and grants no more.
        """
        try:
            async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                finished = await tiles.next_tile()
        except TimeoutError:
            if tiles.idle_s > self._config.idle_timeout_s:
                limit = self._config.idle_timeout_s
                raise DeadlineExceeded(f"no tile was granted for {limit:g} s", field="grant") from None
            return self._heartbeat()
        return None if finished is None else _tile(finished)

    def _heartbeat(self) -> encoder_pb2.EncodeResponse:
        heartbeat = encoder_pb2.Heartbeat(
            forwards_done=self._batcher.forwards_done, tiles_queued=self._batcher.tiles_queued
        )
        return encoder_pb2.EncodeResponse(heartbeat=heartbeat)

    def _layout(self, media: list[Medium]) -> encoder_pb2.Layout:
        tokens = self._preprocessing.tokens_per_tile
        return encoder_pb2.Layout(
            media=[_medium_layout(medium, tokens) for medium in media],
            hidden_size=self._hidden_size,
            dtype=self._dtype,
            transport=encoder_pb2.TRANSPORT_INLINE,
        )


async def _add_medium(
    read: Coroutine[None, None, Medium], before: asyncio.Task[None] | None, add: Callable[[Medium], None]
) -> None:
    medium = await read
    if before is not None:
        await before
    add(medium)


def _medium_layout(medium: Medium, tokens: int) -> encoder_pb2.MediumLayout:
    first, *_ = medium.parts
    return encoder_pb2.MediumLayout(
        content_hash=medium.content_hash,
        width=first.width,
        height=first.height,
        columns=first.plan.columns,
        rows=first.plan.rows,
        has_thumbnail=first.plan.has_thumbnail,
        tokens_per_tile=[tokens] * medium.num_tiles,
        final=True,
        parts=[_part_layout(part, part.stored) for part in medium.parts if part.stored is not None],
    )


def _part_layout(part: Part, stored: StoredPart) -> encoder_pb2.PartLayout:
    return encoder_pb2.PartLayout(
        width=part.width,
        height=part.height,
        columns=part.plan.columns,
        rows=part.plan.rows,
        has_thumbnail=part.plan.has_thumbnail,
        num_tiles=part.plan.num_tiles,
        timestamp_s=stored.timestamp_s,
    )


def _add(media: list[Medium], tiles: TileStream, initial_credit: int, medium: Medium) -> None:
    """The next medium of a stream; its tiles within the initial credit are granted."""
    left = max(initial_credit - sum(other.num_tiles for other in media), 0)
    granted = [GrantedTile(len(media), tile) for tile in range(min(medium.num_tiles, left))]
    media.append(medium)
    tiles.grant(granted)


async def _read_grants(requests: Requests, tiles: TileStream, media: list[Medium]) -> None:
    """Feed grants until the client half-closes."""
    try:
        async for request in requests:
            if request.WhichOneof("message") != "grant":
                raise InvalidRequest("only grants may follow the media", field="grant")
            for number, granted in enumerate(request.grant.tiles):
                tiles.grant(_granted_tiles(granted, media, f"grant.tiles[{number}]"))
                if tiles.num_waiting > MAX_WAITING_GRANTS:
                    raise InvalidRequest(
                        f"more than {MAX_WAITING_GRANTS} granted tiles wait", field=f"grant.tiles[{number}]"
                    )
    except Exception as error:
        tiles.fail(error)
    else:
        tiles.end_grants()


def _granted_tiles(granted: encoder_pb2.TileRange, media: list[Medium], field: str) -> list[GrantedTile]:
    end = granted.first_tile + granted.num_tiles
    if granted.medium >= len(media) or not granted.num_tiles or end > media[granted.medium].num_tiles:
        raise InvalidRequest("no such tiles", field=field)
    return [GrantedTile(granted.medium, tile) for tile in range(granted.first_tile, end)]


def _tile(finished: FinishedTile) -> TileFrame:
    tile = encoder_pb2.Tile(
        medium=finished.granted.medium,
        tile=finished.granted.tile,
        num_tokens=finished.embeds.shape[0],
    )
    return TileFrame(tile, tensor_bytes(finished.embeds))


def _done(tiles: TileStream, total_ns: int) -> encoder_pb2.EncodeResponse:
    timings = encoder_pb2.EncodeTimings(
        decode_ns=tiles.timings.decode_ns,
        tile_ns=tiles.timings.tile_ns,
        queue_ns=tiles.timings.queue_ns,
        encode_ns=tiles.timings.encode_ns,
        total_ns=total_ns,
    )
    return encoder_pb2.EncodeResponse(done=encoder_pb2.Done(timings=timings))


async def serve(config: EncoderConfig, on_ready: Callable[[int], None]) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        CheckpointError, ValueError, OSError: it cannot start as configured.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    checkpoint = await asyncio.to_thread(open_checkpoint, config.model)
    device = _resolve_device(config.device)
    vision = await asyncio.to_thread(VisionEncoder.load, checkpoint, device, config.dtype, config.load_format)
    gpu = await asyncio.to_thread(_prepare_gpu, vision, config) if device.type == "cuda" else None
    servicer = EncoderServicer(config, FingerprintBase(checkpoint), vision, gpu)
    server = Server(config.server, [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.watch_load()
    port = await server.start()
    shutdown = shutdown_signal()
    try:
        await server.set_serving()
        log.info("encoder ready: %s on %s", vision.dtype, vision.device)
        on_ready(port)
        await shutdown.wait()
    finally:
        await server.stop()
        servicer.close()


def _resolve_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _prepare_gpu(vision: VisionEncoder, config: EncoderConfig) -> CudaVision:
    from encoder_service.cuda_vision import CudaVision  # loads Triton

    return CudaVision(vision, config.batch_tiles("cuda"), config.device_cache_mib << 20)
