"""Encoder of the contract: Encode, Attach, GetModel."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count
from typing import Any, Protocol

import grpc
import torch
from PIL import Image

from encoder_service import metrics
from encoder_service.batch_size import BatchSizes
from encoder_service.batcher import Forward, TileBatcher
from encoder_service.config import CPU_BATCH_TILES, EncoderConfig
from encoder_service.containers import Containers
from encoder_service.from_proto import media_from_proto
from encoder_service.headers import HeaderReader
from encoder_service.media_fetcher import MediaFetcher
from encoder_service.medium import Medium
from encoder_service.pixel_budget import PixelBudget
from encoder_service.slot_lease import SlotLease
from encoder_service.stream_reader import Requests, StreamReader, read_grants
from encoder_service.stream_writer import StreamWriter
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_slots import TileSlots
from encoder_service.tile_stream import MIN_CUT_TILES, TileStream, TileWorkers
from encoder_service.tiling import Cutter, TilePlan
from encoder_service.to_proto import done_to_proto, layout_to_proto
from protos import encoder_pb2, tensor_pb2
from protos.errors import NotFound, Overloaded, ServingError, Unavailable
from protos.fingerprint import FingerprintBase
from protos.frames import EncodeEvent
from protos.preprocessing import Preprocessing
from protos.statuses import rpc_errors
from protos.tensors import dtype_to_proto

RETRY_AFTER_S = 1.0

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


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


class Gpu(Protocol):
    """A CudaVision: tiles are made and forwards are queued on a device of its own."""

    makes_pillows_tiles: bool
    batch_sizes: BatchSizes
    uuid: str

    def make_tiles(self, image: Image.Image, plan: TilePlan) -> Cutter: ...

    def launch(self, tiles: Sequence[torch.Tensor]) -> Forward: ...

    def to_host(self, tile: torch.Tensor) -> torch.Tensor: ...


class EncoderServicer:
    """Encode, Attach, GetModel.

    A stream ends when its upload stalls and when it has no tile to come and grants none for
    `idle_timeout_s`. A client that stays connected and does not read is not covered: grpc.aio blocks inside
    the `yield` of an event, in flow control, where no deadline of ours runs. Such a stream keeps its place
    among `max_streams` and what is cut ahead until its client or its connection goes.
    """

    def __init__(
        self,
        config: EncoderConfig,
        base: FingerprintBase,
        vision: Vision,
        gpu: Gpu | None = None,
        fetcher: MediaFetcher | None = None,
        slots: TileSlots | None = None,
    ) -> None:
        """Takes `slots` over, which `gpu` may know too; without them all tiles go inline.

        With `gpu`, tiles are made and forwards are queued there, and nothing calls `vision.encode`.
        """
        self._config = config
        self._preprocessing = vision.preprocessing
        self._hidden_size = vision.hidden_size
        self._dtype = dtype_to_proto(vision.dtype)
        payloads = dict.fromkeys((self._dtype, tensor_pb2.DTYPE_FLOAT8_E4M3))
        self._fingerprints = {payload: base.fingerprint(self._dtype, payload) for payload in payloads}
        most = config.max_batch_tiles or CPU_BATCH_TILES
        sizes = BatchSizes(most, most) if gpu is None else gpu.batch_sizes
        self._batcher = TileBatcher(vision.encode, sizes, launch=None if gpu is None else gpu.launch)
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
            cut_tiles=max(sizes.most, MIN_CUT_TILES),
            make_tiles=gpu.make_tiles if gpu is not None and gpu.makes_pillows_tiles else None,
        )
        self._fetcher = fetcher or MediaFetcher(config.fetch_limits)
        self._reader = StreamReader(
            config.upload_timeout_s,
            HeaderReader(self._workers),
            self._fingerprints,
            self._fetcher,
            config.max_stream_bytes,
        )
        self._slots = slots
        self._gpu_uuid, self._batch_sizes = "" if gpu is None else gpu.uuid, sizes
        self._stream_ids = count()
        self._streams_open = 0
        self._streams: set[TileStream] = set()  # of those that are open, once they may have tiles
        self._is_stalled = False

    @property
    def is_computing(self) -> bool:
        """Whether tiles wait for the tower or are in it."""
        return self._batcher.is_busy

    @property
    def forwards_done(self) -> int:
        return self._batcher.forwards_done

    def set_stalled(self, is_stalled: bool) -> None:
        """While the tower hangs, streams fail and others are refused: clients may have another encoder."""
        self._is_stalled = is_stalled
        if is_stalled:
            for tiles in self._streams:
                tiles.fail(_stalled())

    def watch_load(self) -> None:
        """Let this process's metrics show the load of this servicer."""
        metrics.TILES_QUEUED.set_function(lambda: self._batcher.tiles_queued)
        metrics.FORWARDS.set_function(lambda: self._batcher.forwards_done)
        metrics.STREAMS_OPEN.set_function(lambda: self._streams_open)
        metrics.PIXEL_BYTES.set_function(lambda: self._workers.pixels.used_bytes)
        metrics.watch_tiles(self._cache, self._workers.flights)
        if self._slots is not None:
            metrics.RING_SLOTS.set_function(partial(getattr, self._slots, "num_in_use"))

    def start(self) -> None:
        """On the event loop that serves: hand the tiles' memory to those who ask for it."""
        if self._slots is not None:
            ring = self._slots.ring
            asyncio.get_running_loop().add_reader(ring.socket, ring.hand_over)

    async def stop(self) -> None:
        """Once the server has; the loop must not watch a socket that is closed."""
        if self._slots is not None:
            asyncio.get_running_loop().remove_reader(self._slots.ring.socket)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        self._batcher.close()
        self._cache.close()
        self._workers.containers.close()
        self._fetcher.close()
        self._workers.threads.shutdown(cancel_futures=True)
        if self._slots is not None:
            self._slots.close()

    async def Encode(self, requests: Requests, context: Context) -> AsyncIterator[EncodeEvent]:
        start = time.monotonic_ns()
        self._streams_open += 1
        try:
            async with rpc_errors(context):
                self._refuse_overload()
                opening, payload_dtype = await self._reader.read_open(requests)
                with closing(self._lease(opening.ring_nonce)) as slots:
                    self._refuse_stalled()
                    announced = media_from_proto(opening.media, self._config, self._preprocessing)
                    media: list[Medium] = []
                    tiles = self._open_tiles(media, opening)
                    writer = self._writer(tiles, media, slots, payload_dtype)
                    grants: asyncio.Task[None] | None = None
                    try:
                        add = partial(writer.add, opening.initial_credit)
                        await self._reader.read_media(announced, payload_dtype, requests, add)
                        log.debug("%s: %d media", opening.request_id, len(media))
                        yield self._layout(media, payload_dtype, slots)
                        grants = asyncio.create_task(read_grants(requests, tiles, media, slots))
                        while (event := await writer.next_event()) is not None:
                            yield event
                    except ServingError:
                        # A client that reads behind the end would miss its reason.
                        await slots.all_returned()
                        raise
                    finally:
                        await self._end(tiles, grants)
                yield done_to_proto(tiles.timings, time.monotonic_ns() - start)
        finally:
            self._streams_open -= 1

    async def Attach(
        self, request: encoder_pb2.AttachRequest, context: Context
    ) -> encoder_pb2.AttachResponse:
        slots = self._slots
        async with rpc_errors(context):
            if slots is None:
                raise NotFound("this encoder shares no memory")
        geometry = slots.ring.geometry
        return encoder_pb2.AttachResponse(
            name=slots.ring.name, num_slots=geometry.num_slots, slot_bytes=geometry.slot_bytes
        )

    async def GetModel(
        self, request: encoder_pb2.GetEncoderModelRequest, context: Context
    ) -> encoder_pb2.GetEncoderModelResponse:
        async with rpc_errors(context):
            self._refuse_stalled()
        limits, preprocessing = self._config.image_limits, self._preprocessing
        containers = self._config.container_limits
        return encoder_pb2.GetEncoderModelResponse(
            model=self._config.model,
            fingerprint=self._fingerprints[self._dtype],
            compute_dtype=self._dtype,
            payload_dtype=self._dtype,
            hidden_size=self._hidden_size,
            tokens_per_tile=preprocessing.tokens_per_tile,
            tiling=encoder_pb2.TilingOptions(
                min_tiles=preprocessing.min_tiles,
                max_tiles=preprocessing.max_tiles,
                use_thumbnail=preprocessing.use_thumbnail,
            ),
            max_tiles=max(self._config.max_tiles, preprocessing.max_tiles),
            max_media=self._config.max_media,
            max_media_bytes=limits.max_bytes,
            max_pixels=limits.max_pixels,
            max_video_bytes=containers.max_video_bytes,
            max_video_frames=containers.max_video_frames,
            max_document_bytes=containers.max_document_bytes,
            max_pages=containers.max_pages,
            tiles_queued=self._batcher.tiles_queued,
            streams_open=self._streams_open,
            payload_dtypes=list(self._fingerprints),
            gpu_uuid=self._gpu_uuid,
            batch_tiles=self._batch_sizes.most,
            first_batch_tiles=self._batch_sizes.first,
        )

    def _refuse_overload(self) -> None:
        """What streams hold in memory is bounded one by one, so their number must be."""
        if self._streams_open > self._config.max_streams:
            raise Overloaded(
                f"{self._config.max_streams} streams are open already", retry_after_s=RETRY_AFTER_S
            )

    def _refuse_stalled(self) -> None:
        if self._is_stalled:
            raise _stalled()

    def _lease(self, ring_nonce: bytes) -> SlotLease:
        """For a client that has our ring mapped; another gets its tiles inline."""
        slots = self._slots
        return SlotLease(slots if slots is not None and ring_nonce == slots.ring.nonce else None)

    def _writer(
        self, tiles: TileStream, media: list[Medium], slots: SlotLease, payload_dtype: tensor_pb2.DType
    ) -> StreamWriter:
        idle_timeout_s = self._config.idle_timeout_s
        return StreamWriter(tiles, media, slots, self._batcher, payload_dtype, idle_timeout_s)

    def _layout(
        self, media: list[Medium], payload_dtype: tensor_pb2.DType, slots: SlotLease
    ) -> encoder_pb2.EncodeResponse:
        transport = encoder_pb2.TRANSPORT_SHARED_MEMORY if slots.has_ring else encoder_pb2.TRANSPORT_INLINE
        tokens = self._preprocessing.tokens_per_tile
        return layout_to_proto(media, tokens, self._hidden_size, payload_dtype, transport)

    def _open_tiles(self, media: list[Medium], opening: encoder_pb2.Open) -> TileStream:
        """Of media that grow while it runs; `_end` must follow."""
        number = next(self._stream_ids)
        tiles = TileStream(number, media, self._workers, opening.priority, opening.cache_salt)
        self._streams.add(tiles)
        return tiles

    async def _end(self, tiles: TileStream, grants: asyncio.Task[None] | None) -> None:
        if grants is not None:
            grants.cancel()
        self._streams.discard(tiles)
        await tiles.close()
        # Here, for a caller that has its tiles may be gone before it has heard that this is all.
        if tiles.timings.encode_ns:
            metrics.observe(tiles.timings)


def _stalled() -> Unavailable:
    return Unavailable("the encoder makes no progress", retry_after_s=RETRY_AFTER_S)
