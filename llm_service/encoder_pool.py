"""The encoders this service may use: which of them answer, which holds our checkpoint, which is next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import grpc

from llm_service.config import EncoderPoolConfig
from llm_service.ring_client import RingClient
from protos import encoder_pb2, tensor_pb2
from protos.channel import is_serving, open_channel
from protos.directory import Lookup, Replica, look_up
from protos.encoder_rpc import SERVICE_NAME, EncoderStub
from protos.errors import FingerprintMismatch, ServingError, Unavailable
from protos.fingerprint import FingerprintBase
from protos.placement import Load, choose
from protos.replicas import Replicas
from protos.ring import RingReader

POLL_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0
# Tiles that an encoder may have whatever the others have: a second picture shares the forward of the first
# for little more time (14 tiles take 20 ms, 7 take 17) and finds its cache (docs/benchmarks/placement.md).
FREE_TILES = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderModel:
    """What an encoder said about itself; only kept when it holds our checkpoint."""

    fingerprint: bytes
    gpu_uuid: str = ""  # empty on a CPU
    batch_tiles: int = 0  # most of a forward
    first_batch_tiles: int = 0  # most of a forward that finds the tower idle


class EncoderConnection:
    """One encoder.  Asked every half second whether it is there and what it has loaded."""

    def __init__(
        self, target: str, config: EncoderPoolConfig, base: FingerprintBase, server_name: str = ""
    ) -> None:
        """`server_name`: that its certificate must have, where the target is an address behind it."""
        self.target = target
        self.streams_open = 0
        self.load = Load()  # tiles
        self.model: EncoderModel | None = None
        self.payload_dtype: int | None = None  # DType that its tiles have, as its fingerprint says
        self.mismatch = False
        self._base = base
        self._channel = open_channel(target, config.encoder_tls, server_name)
        self.stub = EncoderStub(self._channel)
        self._rings = RingClient(target, self.stub, config)
        self._wants_fp8 = config.tile_payload == "fp8"
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        await self._rings.close()
        await self._channel.close()

    async def close_when_idle(self) -> None:
        """Its address is no longer one of an encoder: streams that are open may finish."""
        try:
            while self.streams_open:
                await asyncio.sleep(POLL_INTERVAL_S)
        finally:
            await self.close()

    def mark_dead(self) -> None:
        """A stream to it failed; the next poll may bring it back."""
        self.model = None
        self._rings.drop()

    @property
    def ring(self) -> RingReader | None:
        """For the tiles of a new stream."""
        return self._rings.ring

    def drop_ring(self) -> None:
        """The encoder does not know it: it is another process than the one that made it."""
        self._rings.drop()

    async def poll(self) -> None:
        """Ask once and remember the answer.  An encoder that drains says that it is not serving."""
        try:
            response, serving = await asyncio.gather(
                self.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=POLL_TIMEOUT_S),
                is_serving(self._channel, SERVICE_NAME, POLL_TIMEOUT_S),
            )
        except grpc.RpcError:
            self._lose("does not answer")
            return
        if not serving:
            self._lose("takes no more pictures")
            return
        self.load.report(response.tiles_queued)
        ours = self._base.fingerprint(response.compute_dtype, response.payload_dtype)
        if ours != response.fingerprint:
            if not self.mismatch:
                log.error("encoder %s holds another checkpoint than this service", self.target)
            self.model, self.mismatch = None, True
            return
        if self.model is None:
            log.info("encoder %s is ready", self.target)
        self.mismatch = False
        self._accept(response)

    def _accept(self, response: encoder_pb2.GetEncoderModelResponse) -> None:
        """It holds our checkpoint: take its tiles in its encoding, or in 8 bits where that is wanted."""
        self.payload_dtype, fingerprint = response.payload_dtype, response.fingerprint
        if self._wants_fp8 and tensor_pb2.DTYPE_FLOAT8_E4M3 in response.payload_dtypes:
            self.payload_dtype = tensor_pb2.DTYPE_FLOAT8_E4M3
            fingerprint = self._base.fingerprint(response.compute_dtype, self.payload_dtype)
        self.model = EncoderModel(
            fingerprint, response.gpu_uuid, response.batch_tiles, response.first_batch_tiles
        )
        self._rings.ensure()

    def _lose(self, why: str) -> None:
        if self.model is not None:
            log.warning("encoder %s %s", self.target, why)
        self.model, self.mismatch = None, False
        self._rings.drop()

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                log.exception("asking encoder %s failed", self.target)  # the next time may do better
            await asyncio.sleep(POLL_INTERVAL_S)


class EncoderPool:
    """Make it inside a running event loop."""

    def __init__(self, config: EncoderPoolConfig, base: FingerprintBase, lookup: Lookup = look_up) -> None:
        """`lookup` resolves names."""
        self.config = config
        self._base = base
        self._replicas = Replicas("encoder", config.encoders, self._connect, lookup)
        self._last_fingerprint: bytes | None = None

    def start(self) -> None:
        self._replicas.start()

    async def close(self) -> None:
        await self._replicas.close()

    @property
    def connections(self) -> list[EncoderConnection]:
        return list(self._replicas.connections.values())

    @property
    def num_ready(self) -> int:
        return len(_ready(self.connections))

    @property
    def first_batch_tiles(self) -> int:
        """Tiles that come together from an idle encoder: from the one with the fewest."""
        return min(
            (_model(connection).first_batch_tiles for connection in _ready(self.connections)), default=0
        )

    def take_turns(self, gpu_uuid: str, num_tiles: int) -> bool:
        """Whether prefill on that GPU and the forwards of so many tiles would be in each other's way.

        They are where it is the GPU of every encoder that answers, unless one forward could make all of the
        tiles: then the tower has all but done with them when the first comes.
        """
        models = [_model(connection) for connection in _ready(self.connections)]
        return bool(gpu_uuid and models) and all(
            model.gpu_uuid == gpu_uuid and model.batch_tiles < num_tiles for model in models
        )

    async def fingerprint(self) -> bytes:
        """Fingerprint that content hashes are made with; the last one seen while no encoder answers.

        Raises:
            Unavailable, FingerprintMismatch: no encoder has been there yet.
        """
        ready = _ready(self.connections)
        if not ready and self._last_fingerprint is None:
            await self._ask_now()
            ready = _ready(self.connections)
        # Kept while any encoder has it: encoders of another dtype must not rename all pictures.
        if ready and (self._last_fingerprint is None or not _ready(ready, self._last_fingerprint)):
            self._last_fingerprint = _model(ready[0]).fingerprint
        if self._last_fingerprint is None:
            raise self._absence()
        return self._last_fingerprint

    async def choose(
        self, fingerprint: bytes, content_hash: bytes, num_tiles: int = 1, exclude: Collection[str] = ()
    ) -> EncoderConnection:
        """First in rendezvous order of the content whose load is at most 1.25 times the mean.

        Only those with the fingerprint that the hash was made with: others have other dtypes.

        Raises:
            Unavailable, FingerprintMismatch: no encoder answers.
        """
        ready = self._candidates(fingerprint, exclude)
        if not ready:
            await self._ask_now(exclude)
            ready = self._candidates(fingerprint, exclude)
        if not ready:
            raise self._absence()
        loads = {target: connection.load.total for target, connection in ready.items()}
        return ready[choose(content_hash, loads, num_tiles, free=FREE_TILES)]

    def has_candidate(self, fingerprint: bytes, exclude: Collection[str]) -> bool:
        """Whether `choose` would find one without asking around."""
        return bool(self._candidates(fingerprint, exclude))

    def give_up(self, connection: EncoderConnection) -> None:
        """It failed: not chosen again before it has answered; its name may have other addresses by now."""
        connection.mark_dead()
        self._replicas.hurry()

    def _candidates(self, fingerprint: bytes, exclude: Collection[str]) -> dict[str, EncoderConnection]:
        ready = _ready(self.connections, fingerprint)
        return {connection.target: connection for connection in ready if connection.target not in exclude}

    async def _ask_now(self, exclude: Collection[str] = ()) -> None:
        if not self.connections:
            await self._replicas.resolve()
        asked = [connection for connection in self.connections if connection.target not in exclude]
        await asyncio.gather(*(connection.poll() for connection in asked))

    def _connect(self, replica: Replica) -> EncoderConnection:
        return EncoderConnection(replica.address, self.config, self._base, replica.server_name)

    def _absence(self) -> ServingError:
        if any(connection.mismatch for connection in self.connections):
            return FingerprintMismatch("the encoders hold another checkpoint than the language model")
        return Unavailable("no encoder is available for pictures", retry_after_s=RETRY_AFTER_S)


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
