"""The ring of one encoder: found, mapped, and given up when the encoder does not answer any more."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc

from llm_service.config import EncoderPoolConfig
from protos import encoder_pb2
from protos.encoder_rpc import EncoderStub
from protos.ring import RingGeometry, RingReader, RingRefused
from protos.statuses import error_from_rpc

ATTACH_TIMEOUT_S = 10.0
RETRY_S = 60.0

log = logging.getLogger(__name__)


class RingClient:
    """Whatever fails here, tiles come inline."""

    def __init__(self, target: str, stub: EncoderStub, config: EncoderPoolConfig) -> None:
        self.ring: RingReader | None = None  # for new streams; the mapping goes with the last that has it
        self._target = target
        self._stub = stub
        self._config = config
        self._attaching: asyncio.Task[None] | None = None
        self._retry_at_s = 0.0
        self._last_failure = ""

    def ensure(self) -> None:
        """The encoder answers: have its ring, if it can be had."""
        is_wanted = self._config.tile_transport == "auto" and self.ring is None and self._attaching is None
        if is_wanted and time.monotonic() >= self._retry_at_s:
            self._attaching = asyncio.create_task(self._attach())

    def drop(self) -> None:
        """No new stream uses this ring."""
        self.ring = None
        if self._attaching is not None:
            self._attaching.cancel()
            self._attaching = None

    async def close(self) -> None:
        attaching = self._attaching
        self.drop()
        if attaching is not None:
            await asyncio.wait([attaching])

    async def _attach(self) -> None:
        task = asyncio.current_task()
        try:
            ring = await self._open(
                await self._stub.Attach(encoder_pb2.AttachRequest(), timeout=ATTACH_TIMEOUT_S)
            )
        except grpc.RpcError as error:
            self._fail(error_from_rpc(error).message)
        except RingRefused as error:
            self._fail(str(error))
        except Exception:
            log.exception("a ring failed")
            self._fail("internal error")
        else:
            self._use(ring)
        finally:
            if self._attaching is task:  # else it was dropped meanwhile
                self._attaching = None

    async def _open(self, response: encoder_pb2.AttachResponse) -> RingReader:
        """Not on the event loop: it takes a moment.

        Raises:
            RingRefused: it cannot be mapped here.
        """
        geometry = RingGeometry(response.num_slots, response.slot_bytes)
        return await asyncio.to_thread(RingReader.receive, response.name, geometry)

    def _use(self, ring: RingReader) -> None:
        self.ring = ring
        self._last_failure = ""
        geometry = ring.geometry
        log.info(
            "encoder %s: tiles come through shared memory, %d slots of %d bytes",
            self._target,
            geometry.num_slots,
            geometry.slot_bytes,
        )

    def _fail(self, reason: str) -> None:
        """Try again later, and say it once."""
        self._retry_at_s = time.monotonic() + RETRY_S
        if reason != self._last_failure:
            log.warning("encoder %s: tiles come inline: %s", self._target, reason)
        self._last_failure = reason
