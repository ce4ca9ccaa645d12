"""The ring that an encoder is lent: made, attached, replaced, and given up with its Attach call."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

import grpc

from llm_service.config import EncoderPoolConfig
from llm_service.tile_ring import TileRing
from protos import encoder_pb2
from protos.encoder_rpc import EncoderStub
from protos.ring import Ring, RingGeometry, RingRefused
from protos.statuses import error_from_rpc

ATTACH_TIMEOUT_S = 10.0
RETRY_S = 60.0
# An encoder does not report the end of a stream whose Open it never read.
LIMBO_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class RingClient:
    """Of one encoder.  Whatever fails here, tiles come inline."""

    def __init__(self, target: str, stub: EncoderStub, config: EncoderPoolConfig) -> None:
        self.ring: TileRing | None = None  # for new streams
        self._target = target
        self._stub = stub
        self._config = config
        self._tasks: set[asyncio.Task[None]] = set()  # one for each ring, and one that is about to have one
        self._current: asyncio.Task[None] | None = None
        self._retry_at_s = 0.0
        self._last_failure = ""

    def ensure(self, payload_bytes: int) -> None:
        """The encoder answers: have a ring for its tiles of so many bytes, if it can be had."""
        if self.ring is not None and self.ring.limbo_s > LIMBO_TIMEOUT_S:
            log.info("encoder %s: a new ring instead of one with lost slots", self._target)
            self.drop()
        is_wanted = self._config.tile_transport == "auto" and payload_bytes > 0
        if is_wanted and self._current is None and time.monotonic() >= self._retry_at_s:
            task = self._current = asyncio.create_task(self._run(payload_bytes))
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    def drop(self) -> None:
        """No new stream uses this ring; it goes with the last that does."""
        ring, task = self.ring, self._current
        self.ring = self._current = None
        if task is not None and ring is None:
            task.cancel()
        elif task is not None and ring is not None:
            ring.when_idle(partial(_cancel, task))

    async def close(self) -> None:
        self.ring = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, payload_bytes: int) -> None:
        """The life of one ring."""
        try:
            ring = await self._create(payload_bytes)
        except (OSError, RingRefused) as error:
            self._fail(f"no shared memory: {error}")
            return
        tiles = TileRing(ring)
        geometry = ring.geometry
        call = self._stub.Attach(
            encoder_pb2.AttachRequest(
                name=ring.path.name,
                nonce=ring.nonce,
                num_slots=geometry.num_slots,
                slot_bytes=geometry.slot_bytes,
            )
        )
        events = aiter(call)
        is_attached = False
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                is_attached = await anext(events, None) is not None
            ring.unlink()
            if is_attached:
                self._use(tiles, geometry)
                async for event in events:
                    tiles.note_ended(event.streams_ended.streams)
        except TimeoutError:
            self._fail("the encoder does not answer")
        except grpc.RpcError as error:
            if not is_attached:
                self._fail(error_from_rpc(error).message)
        finally:
            call.cancel()
            ring.unlink()
            tiles.retire()
            if self.ring is tiles:
                self.ring = None

    def _use(self, tiles: TileRing, geometry: RingGeometry) -> None:
        if self._current is asyncio.current_task():  # else it was dropped meanwhile
            self.ring = tiles
        self._last_failure = ""
        log.info(
            "encoder %s: tiles come through shared memory, %d slots of %d bytes",
            self._target,
            geometry.num_slots,
            geometry.slot_bytes,
        )

    async def _create(self, payload_bytes: int) -> Ring:
        """Not on the event loop: reserving and mapping takes a moment."""
        geometry = RingGeometry.fitting(self._config.tile_ring_mib << 20, payload_bytes)
        folder = Path(self._config.tile_ring_dir)
        creating = asyncio.get_running_loop().run_in_executor(None, Ring.create, folder, geometry)
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            creating.add_done_callback(_discard)
            raise

    def _fail(self, reason: str) -> None:
        """Try again later, and say it once."""
        self._retry_at_s = time.monotonic() + RETRY_S
        if reason != self._last_failure:
            log.warning("encoder %s: tiles come inline: %s", self._target, reason)
        self._last_failure = reason

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._current is task:
            self._current = None
        if not task.cancelled() and task.exception() is not None:
            log.error("a ring failed", exc_info=task.exception())
            self._fail("internal error")


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _discard(creating: asyncio.Future[Ring]) -> None:
    if not creating.cancelled() and creating.exception() is None:
        creating.result().unlink()
        creating.result().close()
