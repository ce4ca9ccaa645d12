"""Tiles between a front end and an encoder on one host: real servicer, real pool, a ring between them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from encoder_service.metrics import TILES_SENT
from llm_service.config import EncoderPoolConfig
from llm_service.encode_stream import SLOTS_OF_STREAM
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.picture import Picture, TileId
from llm_service.tile_ring import TileRing
from protos import encoder_pb2, tensor_pb2
from protos.checkpoint import open_checkpoint
from protos.errors import InvalidRequest, NotFound, ServingError
from protos.fingerprint import FingerprintBase, content_hash
from protos.ring import PAGE_BYTES, Ring, RingGeometry
from protos.statuses import error_from_rpc
from tests.checkpoints import make_checkpoint
from tests.encoder_service.wire import (
    SIDE,
    TIMEOUT_S,
    Answer,
    ScriptedVision,
    Service,
    chunk,
    finish,
    gradient,
    opening,
    read_layout,
    serving,
    start,
)

NUM_TILES = 13


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", "chat", image_size=SIDE)


@dataclass
class Request:
    """One picture of 13 tiles."""

    encoding: Encoding
    tiles: dict[int, torch.Tensor]
    errors: list[ServingError]

    def want_all(self) -> None:
        for tile in range(NUM_TILES):
            self.encoding.want(TileId(0, tile))

    async def all(self) -> torch.Tensor:
        """[num_tiles, num_tokens, hidden_size]"""
        await until(lambda: len(self.tiles) == NUM_TILES or bool(self.errors))
        assert not self.errors
        return torch.stack([self.tiles[tile] for tile in range(NUM_TILES)])

    async def aclose(self) -> None:
        await self.encoding.close()


@dataclass
class Pair:
    """A front end's pool, and the encoder that it uses."""

    pool: EncoderPool
    vision: ScriptedVision
    service: Service

    @property
    def ring(self) -> TileRing:
        ring = self.pool.connections[0].ring
        assert ring is not None
        return ring

    async def poll(self) -> None:
        await self.pool.connections[0].poll()

    async def attach(self) -> None:
        """Let the pool have a ring, as its next poll would."""
        await self.poll()
        await until(lambda: self.pool.connections[0].ring is not None)

    async def request(self, seed: int) -> Request:
        data = gradient(seed)
        fingerprint = await self.pool.fingerprint()
        picture = Picture(data, 1, 12, True, content_hash(data, 1, 12, True, fingerprint), fingerprint)
        tiles: dict[int, torch.Tensor] = {}
        errors: list[ServingError] = []

        def on_tile(tile: TileId, embeds: torch.Tensor) -> None:
            tiles[tile.tile] = embeds.float().clone()

        size = self.vision.hidden_size
        encoding = Encoding(
            [picture], self.pool, LayoutCache(), size, (), b"", 0, on_tile=on_tile, on_error=errors.append
        )
        return Request(encoding, tiles, errors)

    async def fetch(self, seed: int) -> torch.Tensor:
        async with aclosing(await self.request(seed)) as request:
            await request.encoding.layout()
            request.want_all()
            return await request.all()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.002)


@contextmanager
def counted(**expected: int) -> Iterator[None]:
    """So many tiles are sent in each of these ways meanwhile."""
    names = {name: name.replace("_", "-") for name in ("inline", "shared_memory")}
    before = {name: TILES_SENT.labels(label)._value.get() for name, label in names.items()}
    yield
    after = {name: TILES_SENT.labels(label)._value.get() for name, label in names.items()}
    assert {name: after[name] - before[name] for name in names} == dict.fromkeys(names, 0) | expected


@asynccontextmanager
async def pair(checkpoint: Path, folder: Path, hidden_size: int = 8, **config: Any) -> AsyncIterator[Pair]:
    """Afterwards nothing is left: no file, no stream, no task."""
    vision = ScriptedVision(hidden_size)
    encoder_dir = str(config.pop("encoder_dir", folder))
    async with serving(checkpoint, vision, tile_ring_dir=encoder_dir) as service:
        await service.server.set_serving()
        settings = EncoderPoolConfig(
            encoders=(f"127.0.0.1:{service.server.port}",),
            tile_ring_dir=str(folder),
            tile_ring_mib=1,
            **config,
        )
        pool = EncoderPool(settings, FingerprintBase(open_checkpoint(str(checkpoint))))
        try:
            yield Pair(pool, vision, service)
        finally:
            await pool.close()
    assert not folder.is_dir() or list(folder.iterdir()) == []


class TestSharedMemory:
    async def test_tiles_are_those_that_come_inline(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path) as it:
            with counted(inline=NUM_TILES):
                inline = await it.fetch(0)
            await it.attach()
            with counted(shared_memory=NUM_TILES):
                shared = await it.fetch(0)
        assert torch.equal(inline, shared) and len(inline.unique()) == NUM_TILES

    async def test_the_name_is_gone_as_soon_as_both_have_it(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            assert list(tmp_path.iterdir()) == []
            await it.fetch(0)

    async def test_credited_tiles_that_wait_for_the_engine_hold_no_slot(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            num_free = it.ring.num_free
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                await until(
                    lambda: it.ring.num_free == num_free and len(request.encoding._early) == NUM_TILES
                )
                async with aclosing(await it.request(1)) as other:  # takes the same slots
                    await other.encoding.layout()
                    other.want_all()
                    second = await other.all()
                request.want_all()
                first = await request.all()
            assert torch.equal(first, await it.fetch(0)) and torch.equal(second, await it.fetch(1))

    async def test_a_tiny_ring_serves_many_requests(self, checkpoint: Path, tmp_path: Path) -> None:
        """A stream without a slot has its tiles inline: nobody waits for others, and every tile is right."""
        async with pair(checkpoint, tmp_path, hidden_size=1 << 16) as it:
            await it.attach()
            assert it.ring.num_free == 4
            together = await asyncio.gather(*(it.fetch(seed) for seed in range(12)))
            assert it.ring.num_free == 4
            for seed, tiles in enumerate(together):
                assert torch.equal(tiles, await it.fetch(seed))

    async def test_a_client_that_keeps_its_slots_gets_the_rest_inline(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        async with serving(checkpoint, ScriptedVision(), tile_ring_dir=str(tmp_path)) as service:
            ring, request = open_ring(tmp_path)
            attached = service.stub.Attach(request)
            await attached.read()
            use = encoder_pb2.OpenRing(nonce=ring.nonce, stream=1, slots=[3, 1])
            call = await start(service, [gradient()], ring=use, initial_credit=NUM_TILES)
            assert (await read_layout(call)).transport == encoder_pb2.TRANSPORT_SHARED_MEMORY
            with counted(inline=NUM_TILES - 2, shared_memory=2):
                slots: list[int] = []
                while len(slots) < 2:
                    slots += [tile.slot for tile in (await call.read()).tiles.tiles]
                answer = Answer()
                await answer.read(call, NUM_TILES - 2)
            assert slots == [3, 1] and [tile for _, tile in answer.tiles] == list(range(2, NUM_TILES))
            await finish(call)
            attached.cancel()
            ring.unlink()
            ring.close()
            await until(lambda: len(service.servicer._rings) == 0)

    async def test_tiles_larger_than_a_slot_come_inline(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            it.vision.hidden_size = it.service.servicer._hidden_size = 2048  # twice what a slot holds
            with counted(inline=NUM_TILES):
                assert (await it.fetch(0)).shape == (NUM_TILES, 1, 2048)


class TestInline:
    @pytest.mark.parametrize(
        "config",
        [{"tile_transport": "inline"}, {"encoder_dir": ""}, {"encoder_dir": "/proc"}],
        ids=["switched off here", "switched off there", "not the same folder"],
    )
    async def test_where_no_ring_can_be_had(
        self, checkpoint: Path, tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        async with pair(checkpoint, tmp_path, **config) as it:
            with counted(inline=2 * NUM_TILES):
                await it.fetch(0)
                await until(lambda: not it.pool.connections[0]._rings._tasks)
                await it.poll()
                await it.fetch(1)
        said = [record for record in caplog.records if "tiles come inline" in record.getMessage()]
        assert len(said) == (0 if "tile_transport" in config else 1)

    async def test_where_the_folder_is_missing(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path / "nowhere") as it:
            await it.fetch(0)
            assert it.pool.connections[0].ring is None


class TestLimbo:
    async def test_slots_of_a_cancelled_request_come_back_when_its_stream_has_ended(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            num_free = it.ring.num_free
            it.vision.gate.clear()
            request = await it.request(0)
            await request.encoding.layout()
            assert it.ring.num_free == num_free - SLOTS_OF_STREAM
            await request.aclose()
            await until(lambda: it.ring.num_free == num_free)
            it.vision.gate.set()
            assert it.ring.limbo_s == 0

    async def test_a_refused_request_keeps_no_slot(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            num_free = it.ring.num_free
            request = await it.request(0)
            request.encoding._pictures = [replace(request.encoding._pictures[0], data=b"no picture")]
            with pytest.raises(InvalidRequest):
                await request.encoding.layout()
            await request.aclose()
            await until(lambda: it.ring.num_free == num_free)

    async def test_a_ring_with_lost_slots_is_replaced(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An encoder that never read a stream's Open cannot say that the stream has ended."""
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            lost = it.ring
            lease = lost.lease()
            lease.take(3)
            lease.close()
            monkeypatch.setattr("llm_service.ring_client.LIMBO_TIMEOUT_S", 0.0)
            await it.poll()
            await it.attach()
            assert it.ring is not lost and it.ring.num_free == 256
            await it.fetch(0)


class TestRetiring:
    async def test_streams_of_a_dropped_ring_finish_on_it(self, checkpoint: Path, tmp_path: Path) -> None:
        """An encoder that failed one request, and answers, gets a new ring; the others are not disturbed."""
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            old = it.ring
            it.vision.gate.clear()
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                request.want_all()
                it.pool.connections[0].mark_dead()
                await it.attach()
                assert it.ring is not old and len(it.service.servicer._rings) == 2
                it.vision.gate.set()
                with counted(shared_memory=NUM_TILES):
                    await request.all()
            await until(lambda: len(it.service.servicer._rings) == 1)
            await it.fetch(1)

    async def test_attaching_a_hundred_times_leaks_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        async with pair(checkpoint, tmp_path) as it:

            def held() -> tuple[int, int]:
                gc.collect()
                maps = Path("/proc/self/maps").read_text()
                return len(os.listdir("/proc/self/fd")), maps.count("tessera-ring-")

            await it.attach()
            await it.fetch(0)
            before = held()
            assert before[1] == 2  # ours and the encoder's
            for number in range(100):
                it.pool.connections[0].mark_dead()
                await it.attach()
                if number % 10 == 0:
                    await it.fetch(number)
            await until(lambda: len(it.service.servicer._rings) == 1)
            await until(lambda: held() == before)

    async def test_an_encoder_that_stops_lets_rings_go_with_their_streams(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        async with pair(checkpoint, tmp_path) as it:
            await it.attach()
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                it.service.servicer.drain()
                await it.service.stub.GetModel(encoder_pb2.GetEncoderModelRequest())
                assert len(it.service.servicer._rings) == 1
                request.want_all()
                await request.all()
            await until(lambda: len(it.service.servicer._rings) == 0)
            await until(lambda: it.pool.connections[0].ring is None)


class TestPayload:
    @pytest.mark.parametrize("transport", ["auto", "inline"])
    async def test_8_bits_are_nearly_the_same_and_never_mixed_with_16(
        self, checkpoint: Path, tmp_path: Path, transport: str
    ) -> None:
        async with pair(checkpoint, tmp_path) as it:
            exact = await it.fetch(0)
            own = await it.pool.fingerprint()
        async with pair(checkpoint, tmp_path, tile_payload="fp8", tile_transport=transport) as it:
            if transport == "auto":
                await it.attach()
            close = await it.fetch(0)
            assert await it.pool.fingerprint() != own
        assert torch.allclose(close, exact, rtol=1 / 16)


def open_ring(folder: Path) -> tuple[Ring, encoder_pb2.AttachRequest]:
    ring = Ring.create(folder, RingGeometry(4, PAGE_BYTES))
    request = encoder_pb2.AttachRequest(
        name=ring.path.name, nonce=ring.nonce, num_slots=4, slot_bytes=PAGE_BYTES
    )
    return ring, request

    async def test_is_not_made_behind_pictures_that_are_decoded(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        """No heartbeat is sent meanwhile."""
        vision, decoded = ScriptedVision(), threading.Event()
        vision.gate.clear()
        async with serving(checkpoint, vision, decode_workers=1) as service:
            dtypes = [tensor_pb2.DTYPE_FLOAT8_E4M3]
            call = await start(service, [gradient()], payload_dtypes=dtypes, initial_credit=1)
            await read_layout(call)
            await until(lambda: bool(vision.batches))
            service.servicer._workers.threads.submit(decoded.wait, TIMEOUT_S)
            vision.gate.set()
            answer = Answer()
            await answer.read(call, 1)
            decoded.set()
            assert (await finish(call)).timings is not None


BAD_SLOTS: dict[str, tuple[list[int], list[int], str]] = {
    "not there": ([4], [], "open.ring.slots"),
    "twice at once": ([1, 1], [], "open.ring.slots"),
    "not there, granted": ([], [4], "grant.slots"),
    "lent already": ([1], [1], "grant.slots"),
}


class TestProtocol:
    """What an encoder does with a client that is not ours."""

    @pytest.mark.parametrize("kind", BAD_SLOTS)
    async def test_slots_that_are_not_the_streams_are_refused(
        self, checkpoint: Path, tmp_path: Path, kind: str
    ) -> None:
        credited, slots_granted, name = BAD_SLOTS[kind]
        vision = ScriptedVision()
        vision.gate.clear()
        async with serving(checkpoint, vision, tile_ring_dir=str(tmp_path)) as service:
            ring, request = open_ring(tmp_path)
            attached = service.stub.Attach(request)
            assert (await attached.read()).WhichOneof("event") == "attached"
            use = encoder_pb2.OpenRing(nonce=ring.nonce, stream=1, slots=credited)
            granted = encoder_pb2.Grant(
                tiles=[encoder_pb2.TileRange(first_tile=1, num_tiles=1)], slots=slots_granted
            )
            messages = (
                opening([gradient()], ring=use, initial_credit=1),
                chunk(0, gradient()),
                encoder_pb2.EncodeRequest(grant=granted),
            )
            # What is written behind a refusal may replace its status by gRPC's own.
            call = service.stub.Encode(iter(messages[: 3 if granted.slots else 1]), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError) as caught:
                async for event in call:
                    assert isinstance(event, encoder_pb2.EncodeResponse)
            error = error_from_rpc(caught.value)
            assert (type(error), error.field) == (InvalidRequest, name)
            vision.gate.set()
            if name == "grant.slots":
                assert (await attached.read()).streams_ended.streams == [1]
            attached.cancel()
            ring.unlink()
            ring.close()
            await until(lambda: len(service.servicer._rings) == 0)

    async def test_media_that_are_refused_keep_no_slot(self, checkpoint: Path, tmp_path: Path) -> None:
        """Their stream has ended like any other: its slots may be lent to the next one."""
        async with serving(checkpoint, ScriptedVision(), tile_ring_dir=str(tmp_path)) as service:
            ring, request = open_ring(tmp_path)
            attached = service.stub.Attach(request)
            await attached.read()
            use = encoder_pb2.OpenRing(nonce=ring.nonce, stream=1, slots=[0, 1])
            refused = service.stub.Encode(iter([opening([], ring=use)]), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError) as caught:
                await refused.read()
            assert error_from_rpc(caught.value).field == "media"
            assert (await attached.read()).streams_ended.streams == [1]
            use.stream = 2
            call = await start(service, [gradient()], ring=use, initial_credit=1)
            assert (await read_layout(call)).transport == encoder_pb2.TRANSPORT_SHARED_MEMORY
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
            assert (await attached.read()).streams_ended.streams == [2]
            attached.cancel()
            ring.unlink()
            ring.close()
            await until(lambda: len(service.servicer._rings) == 0)

    async def test_a_ring_that_is_not_attached_means_inline(self, checkpoint: Path, tmp_path: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), tile_ring_dir=str(tmp_path)) as service:
            use = encoder_pb2.OpenRing(nonce=b"x" * 16, stream=1, slots=[7])
            call = await start(service, [gradient()], ring=use, initial_credit=NUM_TILES)
            assert (await read_layout(call)).transport == encoder_pb2.TRANSPORT_INLINE
            answer = await finish(call)
            assert len(answer.tiles) == NUM_TILES and all(answer.payloads)

    async def test_a_ring_is_attached_once(self, checkpoint: Path, tmp_path: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), tile_ring_dir=str(tmp_path)) as service:
            ring, request = open_ring(tmp_path)
            first = service.stub.Attach(request)
            await first.read()
            with pytest.raises(grpc.RpcError) as caught:
                await service.stub.Attach(request).read()
            assert type(error_from_rpc(caught.value)) is NotFound
            first.cancel()
            ring.unlink()
            ring.close()
            await until(lambda: len(service.servicer._rings) == 0)
