"""The encoders this service may use: which of them answer, which holds our checkpoint, which is next."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import grpc

from llm_service.config import EncoderPoolConfig
from protos import encoder_pb2
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.errors import FingerprintMismatch, ServingError, Unavailable
from protos.fingerprint import FingerprintBase

POLL_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0
# Bounded load (Mirrokni, Thorup, Zadimoghaddam 2016): an encoder may hold this multiple of the mean.
MAX_LOAD_RATIO = 1.25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderModel:
    """What an encoder said about itself; only kept when it holds our checkpoint."""

    fingerprint: bytes
    load: int  # tiles waiting for its tower


class EncoderConnection:
    """One encoder.  Asked every half second whether it is there and what it has loaded."""

    def __init__(self, target: str, config: EncoderPoolConfig, base: FingerprintBase) -> None:
        self.target = target
        self.streams_open = 0
        self.model: EncoderModel | None = None
        self.mismatch = False
        self._base = base
        self._channel = open_channel(target, config.encoder_tls)
        self.stub = EncoderStub(self._channel)
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        await self._channel.close()

    def mark_dead(self) -> None:
        """A stream to it failed; the next poll may bring it back."""
        self.model = None

    async def poll(self) -> None:
        """Ask once and remember the answer."""
        try:
            response = await self.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=POLL_TIMEOUT_S)
        except grpc.RpcError:
            if self.model is not None:
                log.warning("encoder %s does not answer", self.target)
            self.model, self.mismatch = None, False
            return
        ours = self._base.fingerprint(response.compute_dtype, response.payload_dtype)
        if ours != response.fingerprint:
            if not self.mismatch:
                log.error("encoder %s holds another checkpoint than this service", self.target)
            self.model, self.mismatch = None, True
            return
        if self.model is None:
            log.info("encoder %s is ready", self.target)
        self.mismatch = False
        self.model = EncoderModel(response.fingerprint, response.tiles_queued)

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                log.exception("asking encoder %s failed", self.target)  # the next time may do better
            await asyncio.sleep(POLL_INTERVAL_S)


class EncoderPool:
    def __init__(self, config: EncoderPoolConfig, base: FingerprintBase) -> None:
        self.config = config
        self.connections = [EncoderConnection(target, config, base) for target in config.encoders]
        self._last_fingerprint: bytes | None = None

    def start(self) -> None:
        for connection in self.connections:
            connection.start()

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self.connections))

    @property
    def num_ready(self) -> int:
        return len(_ready(self.connections))

    async def fingerprint(self) -> bytes:
        """Fingerprint that content hashes are made with; the last one seen while no encoder answers.

        Raises:
            Unavailable, FingerprintMismatch: no encoder has been there yet.
        """
        ready = _ready(self.connections)
        if not ready and self._last_fingerprint is None:
            await _poll_now(self.connections)
            ready = _ready(self.connections)
        # Kept while any encoder has it: encoders of another dtype must not rename all pictures.
        if ready and (self._last_fingerprint is None or not _ready(ready, self._last_fingerprint)):
            self._last_fingerprint = _model(ready[0]).fingerprint
        if self._last_fingerprint is None:
            raise self._absence()
        return self._last_fingerprint

    async def choose(
        self, fingerprint: bytes, content_hash: bytes, exclude: Collection[str] = ()
    ) -> EncoderConnection:
        """First in rendezvous order of the content whose load is at most 1.25 times the mean.

        Only those with the fingerprint that the hash was made with: others have other dtypes.

        Raises:
            Unavailable, FingerprintMismatch: no encoder answers.
        """
        candidates = [connection for connection in self.connections if connection.target not in exclude]
        ready = _ready(candidates, fingerprint)
        if not ready:
            await _poll_now(candidates)
            ready = _ready(candidates, fingerprint)
        if not ready:
            raise self._absence()
        loads = {connection: _model(connection).load + connection.streams_open for connection in ready}
        limit = MAX_LOAD_RATIO * (sum(loads.values()) + 1) / len(ready)
        ready.sort(key=lambda connection: _rendezvous_weight(connection.target, content_hash), reverse=True)
        return next((connection for connection in ready if loads[connection] <= limit), ready[0])

    def _absence(self) -> ServingError:
        if any(connection.mismatch for connection in self.connections):
            return FingerprintMismatch("the encoders hold another checkpoint than the language model")
        return Unavailable("no encoder is available for pictures", retry_after_s=RETRY_AFTER_S)


async def _poll_now(connections: Iterable[EncoderConnection]) -> None:
    await asyncio.gather(*(connection.poll() for connection in connections))


def _ready(
    connections: Iterable[EncoderConnection], fingerprint: bytes | None = None
) -> list[EncoderConnection]:
    """Those that answer, with this fingerprint if one is given."""
    return [
        connection
        for connection in connections
        if connection.model is not None and fingerprint in (None, connection.model.fingerprint)
    ]


def _model(connection: EncoderConnection) -> EncoderModel:
    assert connection.model is not None
    return connection.model


def _rendezvous_weight(target: str, content_hash: bytes) -> bytes:
    """Highest random weight hashing (Thaler and Ravishankar 1998)."""
    return hashlib.sha256(content_hash + target.encode()).digest()
