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
from encoder_service.slot_lease import MOST_AWAY
from encoder_service.tile_slots import TileSlots
from llm_service.config import EncoderPoolConfig
from llm_service.encode_stream import ArrivedTile, EncodeStream
from llm_service.encoder_pool import EncoderConnection, EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.picture import Picture, TileId
from protos import encoder_pb2, tensor_pb2
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import EncodeCall
from protos.errors import DeadlineExceeded, InvalidRequest, NotFound, ServingError, Unavailable
from protos.fingerprint import FingerprintBase, content_hash
from protos.frames import TileFrame
from protos.ring import RingReader
from protos.statuses import error_from_rpc
from tests.checkpoints import make_checkpoint
from tests.encoder_service.wire import (
    SIDE,
    TIMEOUT_S,
    Answer,
    ScriptedVision,
    Service,
    corrupt_pixels,
    finish,
    gradient,
    make_slots,
    read_layout,
    serving,
    start,
)

NUM_TILES = 13
# Of float32: four slots of such tiles are 1 MiB.
LARGE = 1 << 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", "chat", image_size=SIDE)


@dataclass
class Request:
    """One picture of 13 tiles."""

    encoding: Encoding
    tiles: dict[int, torch.Tensor]
    writes: list[TileId]
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
    def connection(self) -> EncoderConnection:
        return self.pool.connections[0]

    @property
    def ring(self) -> RingReader:
        assert self.connection.ring is not None
        return self.connection.ring

    @property
    def slots(self) -> TileSlots:
        assert self.service.slots is not None
        return self.service.slots

    async def poll(self) -> None:
        await self.connection.poll()

    async def attach(self) -> None:
        """Let the pool have a ring, as its next poll would."""
        await self.poll()
        await until(lambda: self.connection.ring is not None)

    def restart(self) -> None:
        """As far as the ring is concerned, and without the pool's notice."""
        asyncio.get_running_loop().remove_reader(self.slots.ring.socket)
        self.slots.close()
        servicer = self.service.servicer
        servicer._slots = make_slots(self.vision, servicer._config)
        servicer.start()

    async def picture(self, seed: int) -> Picture:
        data = gradient(seed)
        fingerprint = await self.pool.fingerprint()
        return Picture(data, 1, 12, True, content_hash(data, 1, 12, True, fingerprint), fingerprint)

    async def request(self, seed: int) -> Request:
        """A tile that is delivered has the values that were written last by then."""
        written: dict[int, torch.Tensor] = {}
        tiles: dict[int, torch.Tensor] = {}
        writes: list[TileId] = []
        errors: list[ServingError] = []

        def write(tile: TileId, embeds: torch.Tensor) -> None:
            writes.append(tile)
            written[tile.tile] = embeds.float().clone()

        def on_tile(tile: TileId) -> None:
            tiles[tile.tile] = written[tile.tile].clone()

        encoding = Encoding(
            [await self.picture(seed)],
            self.pool,
            LayoutCache(),
            self.vision.hidden_size,
            (),
            b"",
            0,
            write,
            on_tile=on_tile,
            on_error=errors.append,
        )
        return Request(encoding, tiles, writes, errors)

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
async def pair(
    checkpoint: Path,
    hidden_size: int = 8,
    ring_mib: int = 1,
    idle_timeout_s: float = 60.0,
    **config: Any,
) -> AsyncIterator[Pair]:
    """Afterwards nothing is left: no stream, no task, no slot."""
    vision = ScriptedVision(hidden_size)
    async with serving(checkpoint, vision, idle_timeout_s=idle_timeout_s, tile_ring_mib=ring_mib) as service:
        await service.server.set_serving()
        settings = EncoderPoolConfig(encoders=(f"127.0.0.1:{service.server.port}",), **config)
        pool = EncoderPool(settings, FingerprintBase(open_checkpoint(str(checkpoint))))
        try:
            yield Pair(pool, vision, service)
        finally:
            await pool.close()


@asynccontextmanager
async def alone(checkpoint: Path, hidden_size: int = 8) -> AsyncIterator[Service]:
    """An encoder whose clients are not ours."""
    vision = ScriptedVision(hidden_size)
    async with serving(checkpoint, vision, tile_ring_mib=1) as service:
        yield service


def nonce_of(service: Service) -> bytes:
    assert service.slots is not None
    return service.slots.ring.nonce


async def read_tiles(call: EncodeCall, num_tiles: int) -> list[encoder_pb2.Tile]:
    """What is announced; nothing is returned."""
    tiles: list[encoder_pb2.Tile] = []
    while len(tiles) < num_tiles:
        event = await call.read()
        assert isinstance(event, TileFrame | encoder_pb2.EncodeResponse)
        tiles += [event.tile] if isinstance(event, TileFrame) else event.tiles.tiles
    return tiles


class TestSharedMemory:
    async def test_tiles_are_those_that_come_inline(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            with counted(inline=NUM_TILES):
                inline = await it.fetch(0)
            await it.attach()
            with counted(shared_memory=NUM_TILES):
                shared = await it.fetch(0)
        assert torch.equal(inline, shared) and len(inline.unique()) == NUM_TILES

    async def test_credited_tiles_that_wait_for_the_engine_hold_no_slot(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            await it.attach()
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                await until(lambda: len(request.encoding._early) == NUM_TILES and it.slots.num_in_use == 0)
                async with aclosing(await it.request(1)) as other:  # takes the same slots
                    await other.encoding.layout()
                    other.want_all()
                    second = await other.all()
                request.want_all()
                first = await request.all()
            assert torch.equal(first, await it.fetch(0)) and torch.equal(second, await it.fetch(1))

    async def test_a_tiny_ring_serves_many_requests(self, checkpoint: Path) -> None:
        """A tile without a slot comes inline: nobody waits for others, and every tile is right."""
        async with pair(checkpoint, hidden_size=LARGE) as it:
            await it.attach()
            assert it.ring.geometry.num_slots == 4
            together = await asyncio.gather(*(it.fetch(seed) for seed in range(12)))
            await until(lambda: it.slots.num_in_use == 0)
            for seed, tiles in enumerate(together):
                assert torch.equal(tiles, await it.fetch(seed))

    async def test_tiles_larger_than_a_slot_come_inline(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            await it.attach()
            it.vision.hidden_size = it.service.servicer._hidden_size = 2048  # twice what a slot holds
            with counted(inline=NUM_TILES):
                assert (await it.fetch(0)).shape == (NUM_TILES, 1, 2048)


class TestKeptSlots:
    async def test_when_none_is_free_the_rest_comes_inline(self, checkpoint: Path) -> None:
        async with alone(checkpoint, hidden_size=LARGE) as service:
            call = await start(service, [gradient()], ring_nonce=nonce_of(service), initial_credit=NUM_TILES)
            assert (await read_layout(call)).transport == encoder_pb2.TRANSPORT_SHARED_MEMORY
            with counted(inline=NUM_TILES - 4, shared_memory=4):
                tiles = await read_tiles(call, NUM_TILES)
            assert [tile.tile for tile in tiles] == list(range(NUM_TILES))
            assert sorted(tile.slot for tile in tiles[:4]) == [0, 1, 2, 3]
            assert (await finish(call)).timings is not None

    async def test_a_client_has_some_of_them_at_most(self, checkpoint: Path) -> None:
        async with alone(checkpoint) as service:
            pictures, num_tiles = [gradient(0), gradient(1)], 2 * NUM_TILES
            call = await start(service, pictures, ring_nonce=nonce_of(service), initial_credit=num_tiles)
            await read_layout(call)
            with counted(inline=num_tiles - MOST_AWAY, shared_memory=MOST_AWAY):
                tiles = await read_tiles(call, num_tiles)
            assert len({tile.slot for tile in tiles if tile.HasField("slot")}) == MOST_AWAY
            assert (await finish(call)).timings is not None

    @pytest.mark.parametrize("ending", ["cancelled", "half-closed"])
    async def test_they_are_free_when_the_stream_ends(self, checkpoint: Path, ending: str) -> None:
        async with alone(checkpoint) as service:
            call = await start(service, [gradient()], ring_nonce=nonce_of(service), initial_credit=NUM_TILES)
            await read_layout(call)
            await service.until_load(slots=NUM_TILES)
            if ending == "cancelled":
                call.cancel()
            else:
                await read_tiles(call, NUM_TILES)
                assert (await finish(call)).timings is not None
            await service.until_load(slots=0)


class TestInline:
    @pytest.mark.parametrize(
        ("config", "num_lines"),
        [({"tile_transport": "inline"}, 0), ({"ring_mib": 0}, 1)],
        ids=["switched off here", "no ring there"],
    )
    async def test_where_no_ring_can_be_had(
        self,
        checkpoint: Path,
        config: dict[str, Any],
        num_lines: int,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It is tried again, and said once."""
        monkeypatch.setattr("llm_service.ring_client.RETRY_S", 0.0)
        async with pair(checkpoint, **config) as it:
            with counted(inline=3 * NUM_TILES):
                for seed in range(3):
                    await it.poll()
                    await until(lambda: it.connection._rings._attaching is None)
                    await it.fetch(seed)
        said = [record for record in caplog.records if "tiles come inline" in record.getMessage()]
        assert len(said) == num_lines

    async def test_where_the_encoder_is_on_another_host(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its name is nobody's here."""
        async with pair(checkpoint) as it:
            it.slots.ring.name = "tessera-ring-" + "0" * 32
            await it.poll()
            await until(lambda: it.connection._rings._attaching is None)
            with counted(inline=NUM_TILES):
                await it.fetch(0)
            assert it.connection.ring is None
        assert "no process of this host gives the ring" in caplog.text


class TestLateReader:
    """The encoder has ended a stream of which tiles have not been read, and their slots have others."""

    async def test_knows_that_its_tiles_are_not_whole(self, checkpoint: Path) -> None:
        async with pair(checkpoint, idle_timeout_s=0.3) as it:
            await it.attach()
            pictures = [await it.picture(0)]
            stream = EncodeStream(it.connection, it.pool.config, pictures, 8, has_substitute=lambda: False)
            await stream.open((), b"", 0, NUM_TILES)
            tiles = stream.tiles(lambda: True)
            first = await anext(tiles)
            right = first.embeds.clone()
            assert first.is_whole()
            await self._overwrite(it)
            assert not first.is_whole() and not torch.equal(first.embeds, right)
            with pytest.raises((DeadlineExceeded, Unavailable)):
                async for arrived in tiles:
                    assert not arrived.is_whole()
            assert stream.num_due == NUM_TILES
            stream.close()

    async def test_delivers_no_tile_that_was_overwritten(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request asks for it again, or fails where no encoder is left."""
        read_now = asyncio.Event()
        tiles_of_stream = EncodeStream.tiles

        async def late_tiles(
            stream: EncodeStream, is_waiting: Callable[[], bool]
        ) -> AsyncIterator[ArrivedTile]:
            async for arrived in tiles_of_stream(stream, is_waiting):
                await read_now.wait()
                yield arrived

        async with pair(checkpoint, idle_timeout_s=0.3) as it:
            await it.attach()
            expected = await it.fetch(0)
            monkeypatch.setattr(EncodeStream, "tiles", late_tiles)
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                request.want_all()
                await self._overwrite(it)
                read_now.set()
                await until(lambda: len(request.tiles) == NUM_TILES or bool(request.errors))
                assert len(request.writes) > len(request.tiles)
                for tile, embeds in request.tiles.items():
                    assert torch.equal(embeds, expected[tile])

    async def _overwrite(self, it: Pair) -> None:
        """By the tiles of another picture, once the encoder has tired of the stream that is open."""
        await until(lambda: it.slots.num_in_use > 0)
        await it.service.until_load(streams=0, slots=0)
        sequences = self._sequences(it)
        call = await start(
            it.service, [gradient(1)], ring_nonce=nonce_of(it.service), initial_credit=NUM_TILES
        )
        await read_layout(call)
        await read_tiles(call, NUM_TILES)
        await finish(call)
        changed = [old != new for old, new in zip(sequences, self._sequences(it), strict=True)]
        assert sum(changed) == NUM_TILES

    def _sequences(self, it: Pair) -> list[int]:
        return [it.ring.sequence(slot) for slot in range(it.ring.geometry.num_slots)]


class TestEndings:
    async def test_a_cancelled_request(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            await it.attach()
            it.vision.gate.clear()
            request = await it.request(0)
            await request.encoding.layout()
            await until(lambda: bool(it.vision.batches))
            await request.aclose()
            it.vision.gate.set()
            await it.service.until_load(streams=0, slots=0)
            await it.fetch(0)

    async def test_a_refusal_behind_tiles_in_slots(self, checkpoint: Path) -> None:
        """Returning the slots must not replace what the encoder said."""
        corrupt = corrupt_pixels(gradient(1, format="JPEG"))
        async with pair(checkpoint) as it:
            await it.attach()
            for _ in range(10):
                request = await it.request(0)
                encoding = request.encoding
                good = encoding._pictures[0]
                name = content_hash(corrupt, 1, 12, True, good.fingerprint)
                bad = replace(good, data=corrupt, content_hash=name)
                encoding._pictures, encoding._laid_out = [good, bad], [None, None]
                await encoding.layout()
                request.want_all()
                encoding.want(TileId(1, 0))
                await until(lambda: bool(request.errors))  # noqa: B023
                await request.aclose()
                assert [(type(error), error.field) for error in request.errors] == [
                    (InvalidRequest, "media[1].data")
                ]

    async def test_a_refused_request(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            await it.attach()
            request = await it.request(0)
            request.encoding._pictures = [replace(request.encoding._pictures[0], data=b"no picture")]
            with pytest.raises(InvalidRequest):
                await request.encoding.layout()
            await request.aclose()
            await it.service.until_load(streams=0, slots=0)

    async def test_streams_of_a_dropped_mapping_finish_on_it(self, checkpoint: Path) -> None:
        """An encoder that failed one request, and answers, is mapped again; the others are not disturbed."""
        async with pair(checkpoint) as it:
            await it.attach()
            old = it.ring
            it.vision.gate.clear()
            async with aclosing(await it.request(0)) as request:
                await request.encoding.layout()
                request.want_all()
                it.connection.mark_dead()
                await it.attach()
                assert it.ring is not old and it.ring.nonce == old.nonce
                it.vision.gate.set()
                with counted(shared_memory=NUM_TILES):
                    await request.all()
            await it.fetch(1)

    async def test_an_encoder_that_has_restarted_is_mapped_again(self, checkpoint: Path) -> None:
        async with pair(checkpoint) as it:
            await it.attach()
            expected, old = await it.fetch(0), it.ring.nonce
            it.restart()
            with counted(inline=NUM_TILES):
                assert torch.equal(await it.fetch(0), expected)
            assert it.connection.ring is None
            await it.attach()
            assert it.ring.nonce != old
            with counted(shared_memory=NUM_TILES):
                assert torch.equal(await it.fetch(0), expected)

    async def test_attaching_a_hundred_times_leaks_nothing(self, checkpoint: Path) -> None:
        def held() -> tuple[int, int]:
            gc.collect()
            maps = Path("/proc/self/maps").read_text()
            return len(os.listdir("/proc/self/fd")), maps.count("memfd:tessera-ring")

        async with pair(checkpoint) as it:
            await it.attach()
            await it.fetch(0)
            before = held()
            assert before[1] == 2  # ours and the encoder's
            for number in range(100):
                it.connection.mark_dead()
                await it.attach()
                if number % 10 == 0:
                    await it.fetch(number)
            await until(lambda: held() == before)
        await until(lambda: held()[1] == 0)


class TestPayload:
    @pytest.mark.parametrize("transport", ["auto", "inline"])
    async def test_8_bits_are_nearly_the_same_and_never_mixed_with_16(
        self, checkpoint: Path, transport: str
    ) -> None:
        async with pair(checkpoint) as it:
            exact = await it.fetch(0)
            own = await it.pool.fingerprint()
        async with pair(checkpoint, tile_payload="fp8", tile_transport=transport) as it:
            if transport == "auto":
                await it.attach()
            with counted(**{"shared_memory" if transport == "auto" else "inline": NUM_TILES}):
                close = await it.fetch(0)
            assert await it.pool.fingerprint() != own
        assert torch.allclose(close, exact, rtol=1 / 16)

    async def test_8_bits_are_not_made_behind_pictures_that_are_decoded(self, checkpoint: Path) -> None:
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


class TestProtocol:
    """What an encoder does with a client that is not ours."""

    @pytest.mark.parametrize("kind", ["never away", "twice", "not there"])
    async def test_a_returned_slot_that_the_client_has_not_got_is_refused(
        self, checkpoint: Path, kind: str
    ) -> None:
        async with alone(checkpoint) as service:
            call = await start(service, [gradient()], ring_nonce=nonce_of(service), initial_credit=1)
            await read_layout(call)
            [tile] = await read_tiles(call, 1)
            slots = {"never away": [tile.slot ^ 1], "twice": [tile.slot] * 2, "not there": [1 << 31]}
            await call.write(encoder_pb2.EncodeRequest(grant=encoder_pb2.Grant(slots=slots[kind])))
            with pytest.raises(grpc.RpcError) as caught:
                await finish(call)
            error = error_from_rpc(caught.value)
            assert (type(error), error.field) == (InvalidRequest, "grant.slots")

    async def test_a_slot_that_another_stream_has_is_refused(self, checkpoint: Path) -> None:
        async with alone(checkpoint) as service:
            nonce = nonce_of(service)
            calls = [await start(service, [gradient()], ring_nonce=nonce, initial_credit=1) for _ in range(2)]
            for call in calls:
                await read_layout(call)
            [[kept], [_]] = [await read_tiles(call, 1) for call in calls]
            await calls[1].write(encoder_pb2.EncodeRequest(grant=encoder_pb2.Grant(slots=[kept.slot])))
            with pytest.raises(grpc.RpcError) as caught:
                await finish(calls[1])
            assert error_from_rpc(caught.value).field == "grant.slots"
            assert (await finish(calls[0])).timings is not None

    async def test_a_client_that_has_another_ring_gets_its_tiles_inline(self, checkpoint: Path) -> None:
        async with alone(checkpoint) as service:
            call = await start(service, [gradient()], ring_nonce=b"x" * 16, initial_credit=NUM_TILES)
            assert (await read_layout(call)).transport == encoder_pb2.TRANSPORT_INLINE
            answer = await finish(call)
            assert len(answer.tiles) == NUM_TILES and all(answer.payloads)

    async def test_an_encoder_without_a_ring_names_none(self, checkpoint: Path) -> None:
        async with serving(checkpoint, ScriptedVision()) as service:
            with pytest.raises(grpc.RpcError) as caught:
                await service.stub.Attach(encoder_pb2.AttachRequest())
            assert type(error_from_rpc(caught.value)) is NotFound
