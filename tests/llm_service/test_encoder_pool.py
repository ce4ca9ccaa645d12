"""Which encoder gets a picture, and who is found, lost and found again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from llm_service.config import EncoderPoolConfig
from llm_service.encode_stream import EncodeStream
from llm_service.encoder_pool import FREE_TILES, EncoderConnection, EncoderModel, EncoderPool
from llm_service.picture import TileId
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.errors import FingerprintMismatch, Unavailable
from protos.options import SHARED_OPTIONS
from tests.llm_service.scripted_encoder import (
    FINGERPRINT,
    HIDDEN_SIZE,
    FixedBase,
    ScriptedEncoder,
    encoders,
    make_picture,
)
from tests.llm_service.test_encode_stream import of_kind

PICTURE = make_picture(b"a cat")
HASHES = [hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(400)]


def make_pool(*targets: str) -> EncoderPool:
    return EncoderPool(EncoderPoolConfig(encoders=targets), FixedBase())  # type: ignore[arg-type]


@asynccontextmanager
async def pool_of(count: int, is_reversed: bool = False) -> AsyncIterator[EncoderPool]:
    """Encoders that are ready as far as the pool knows; nobody listens."""
    targets = [f"encoder-{number}:50051" for number in range(count)]
    pool = make_pool(*(reversed(targets) if is_reversed else targets))
    for connection in pool.connections:
        set_load(connection, 0)
    yield pool
    await pool.close()


def set_load(connection: EncoderConnection, load: int) -> None:
    connection.model = EncoderModel(FINGERPRINT)
    connection.load.report(load)


async def choices(pool: EncoderPool, exclude: tuple[str, ...] = ()) -> list[str]:
    return [(await pool.choose(FINGERPRINT, content_hash, 1, exclude)).target for content_hash in HASHES]


class TestChoice:
    async def test_the_same_picture_goes_to_the_same_encoder(self) -> None:
        async with pool_of(4) as first, pool_of(4, is_reversed=True) as second:
            assert await choices(first) == await choices(first) == await choices(second)

    async def test_every_encoder_gets_its_share(self) -> None:
        async with pool_of(4) as pool:
            counts = Counter(await choices(pool))
            assert len(counts) == 4 and min(counts.values()) > 60

    async def test_a_lost_encoder_moves_only_its_own_pictures(self) -> None:
        async with pool_of(4) as pool:
            before = await choices(pool)
            lost = pool.connections[2]
            lost.mark_dead()
            after = await choices(pool)
            excluded = await choices(pool, (lost.target,))
        assert after == excluded and lost.target not in after
        moved = [old for old, new in zip(before, after, strict=True) if old != new]
        assert set(moved) == {lost.target}
        heirs = Counter(new for old, new in zip(before, after, strict=True) if old != new)
        assert len(heirs) == 3  # not all to one neighbour

    async def test_a_new_encoder_takes_only_its_own_share(self) -> None:
        async with pool_of(3) as smaller, pool_of(4) as larger:
            pairs = list(zip(await choices(smaller), await choices(larger), strict=True))
        moved = {new for old, new in pairs if old != new}
        assert moved == {"encoder-3:50051"}
        assert 60 < sum(old != new for old, new in pairs) < 140

    @pytest.mark.parametrize("measure", ["tiles queued", "tiles awaited"])
    async def test_nobody_gets_more_than_a_quarter_above_the_mean(self, measure: str) -> None:
        async with pool_of(4) as pool:
            loads: Counter[str] = Counter()
            for total, content_hash in enumerate([HASHES[0]] * 100, 1):
                connection = await pool.choose(FINGERPRINT, content_hash)
                loads[connection.target] += 1
                if measure == "tiles queued":
                    set_load(connection, loads[connection.target])
                else:
                    connection.load.own += 1
                assert max(loads.values()) <= max(1.25 * total / 4, FREE_TILES) + 1
            assert loads.most_common(1)[0][0] == (await pool_first(pool))

    async def test_a_busy_first_choice_yields_to_the_second_in_order(self) -> None:
        async with pool_of(3) as pool:
            first = await pool.choose(FINGERPRINT, HASHES[0])
            second = await pool.choose(FINGERPRINT, HASHES[0], 1, (first.target,))
            set_load(first, 10)
            assert await pool.choose(FINGERPRINT, HASHES[0]) is second


async def pool_first(pool: EncoderPool) -> str:
    """First choice for HASHES[0] when nobody is busy."""
    for connection in pool.connections:
        set_load(connection, 0)
        connection.load.own = 0
    return (await pool.choose(FINGERPRINT, HASHES[0])).target


@asynccontextmanager
async def running(*scripted: ScriptedEncoder) -> AsyncIterator[EncoderPool]:
    async with encoders(*scripted) as targets:
        pool = make_pool(*targets)
        pool.start()
        try:
            yield pool
        finally:
            await pool.close()


async def until_ready(pool: EncoderPool, count: int, seconds: float = 3.0) -> float:
    """Seconds until `count` encoders are ready."""
    start = time.monotonic()
    while pool.num_ready != count:
        assert time.monotonic() - start < seconds, f"{pool.num_ready} are ready"
        await asyncio.sleep(0.01)
    return time.monotonic() - start


class TestGpu:
    async def test_all_that_answer_must_be_on_it(self) -> None:
        async with pool_of(3) as pool:
            first, second, lost = pool.connections
            first.model = EncoderModel(FINGERPRINT, "GPU-1")
            second.model = EncoderModel(FINGERPRINT, "GPU-2")
            lost.mark_dead()
            assert not pool.take_turns("GPU-1", 9)
            second.model = EncoderModel(FINGERPRINT, "GPU-1")
            assert pool.take_turns("GPU-1", 9) and not pool.take_turns("GPU-2", 9)

    async def test_nobody_is_on_a_cpu(self) -> None:
        async with pool_of(1) as pool:
            assert not pool.take_turns("", 9)
            pool.connections[0].mark_dead()
            assert not pool.take_turns("GPU-1", 9)

    async def test_tiles_of_one_forward_are_in_nobodys_way(self) -> None:
        async with pool_of(2) as pool:
            for connection, batch_tiles in zip(pool.connections, (8, 16), strict=True):
                connection.model = EncoderModel(FINGERPRINT, "GPU-1", batch_tiles)
            assert [pool.take_turns("GPU-1", num_tiles) for num_tiles in (0, 8, 16, 17)] == [0, 0, 0, 1]

    async def test_an_encoder_says_where_it_is_and_how_its_tiles_come(self) -> None:
        encoder = ScriptedEncoder()
        encoder.gpu_uuid, encoder.batch_tiles, encoder.first_batch_tiles = "GPU-1", 8, 4
        async with encoders(encoder) as targets:
            pool = make_pool(*targets)
            await pool.fingerprint()
            assert pool.take_turns("GPU-1", 9) and not pool.take_turns("GPU-1", 8)
            assert pool.first_batch_tiles == 4
            await pool.close()


class TestPresence:
    async def test_an_encoder_is_found_and_its_load_known(self) -> None:
        encoder = ScriptedEncoder()
        encoder.tiles_queued = 7
        async with running(encoder) as pool:
            await until_ready(pool, 1)
            assert pool.connections[0].model == EncoderModel(FINGERPRINT)
            assert pool.connections[0].load.total == 7

    async def test_before_the_first_poll_the_first_request_asks_itself(self) -> None:
        async with encoders(ScriptedEncoder()) as targets:
            pool = make_pool(*targets)
            assert await pool.fingerprint() == FINGERPRINT
            assert (await pool.choose(FINGERPRINT, HASHES[0])).target == targets[0]
            await pool.close()

    async def test_one_that_comes_back_is_found_soon(self) -> None:
        encoder = ScriptedEncoder()
        async with running(encoder) as pool:
            await until_ready(pool, 1)
            await encoder.stop()
            assert await until_ready(pool, 0) < 1.0
            await asyncio.sleep(2.0)  # long enough for the reconnection to back off
            await encoder.listen()
            assert await until_ready(pool, 1) < 1.6

    async def test_one_that_was_given_up_but_answers_is_back_with_the_next_poll(self) -> None:
        async with running(ScriptedEncoder()) as pool:
            await until_ready(pool, 1)
            pool.connections[0].mark_dead()
            assert pool.num_ready == 0
            assert await until_ready(pool, 1) < 0.8

    async def test_nobody_there_is_unavailable_with_a_time_to_come_back(self) -> None:
        pool = make_pool("127.0.0.1:1")
        for waiting in (pool.fingerprint(), pool.choose(FINGERPRINT, HASHES[0])):
            with of_kind(Unavailable, "encoder") as raised:
                await waiting
            assert raised.value.retry_after_s and "127.0.0.1" not in raised.value.message
        await pool.close()

    async def test_no_encoder_configured_is_unavailable(self) -> None:
        pool = make_pool()
        with of_kind(Unavailable):
            await pool.choose(FINGERPRINT, HASHES[0])

    async def test_when_all_are_excluded_nobody_is_asked(self) -> None:
        class Stuck(ScriptedEncoder):
            async def GetModel(self, request: Any, context: Any) -> Any:
                await asyncio.Event().wait()

        async with encoders(Stuck()) as targets:
            pool = make_pool(*targets)
            start = time.monotonic()
            with of_kind(Unavailable):
                await pool.choose(FINGERPRINT, HASHES[0], 1, targets)
            assert time.monotonic() - start < 0.1
            await pool.close()

    async def test_one_that_accepts_but_does_not_answer_does_not_block_for_long(self) -> None:
        class Stuck(ScriptedEncoder):
            async def GetModel(self, request: Any, context: Any) -> Any:
                await asyncio.Event().wait()

        async with encoders(Stuck()) as targets:
            pool = make_pool(*targets)
            start = time.monotonic()
            with of_kind(Unavailable):
                await pool.choose(FINGERPRINT, HASHES[0])
            assert time.monotonic() - start < 2.5
            await pool.close()

    async def test_polling_survives_whatever_an_encoder_answers(self) -> None:
        class Moody(ScriptedEncoder):
            polls = 0

            async def GetModel(self, request: Any, context: Any) -> Any:
                self.polls += 1
                if self.polls <= 2:
                    await context.abort(list_of_codes[self.polls - 1], "not now")
                return await super().GetModel(request, context)

        list_of_codes = [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN]
        async with running(Moody()) as pool:
            await until_ready(pool, 1)

    async def test_polling_survives_a_bug(self) -> None:
        class Flaky(FixedBase):
            calls = 0

            def fingerprint(self, compute_dtype: int, payload_dtype: int) -> bytes:
                self.calls += 1
                if self.calls == 1:
                    raise OSError("the checkpoint's disk is gone for a moment")
                return FINGERPRINT

        async with encoders(ScriptedEncoder()) as targets:
            pool = EncoderPool(EncoderPoolConfig(encoders=tuple(targets)), Flaky())  # type: ignore[arg-type]
            pool.start()
            await until_ready(pool, 1)
            await pool.close()


class Draining(ScriptedEncoder):
    """An encoder with the health service of the real server."""

    def __init__(self) -> None:
        super().__init__()
        self.health = health.aio.HealthServicer()

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=[*SHARED_OPTIONS, ("grpc.so_reuseport", 0)])
        add_encoder_servicer(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.set_serving(True)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.health.set(SERVICE_NAME, status.SERVING if serving else status.NOT_SERVING)


class TestHealth:
    async def test_one_that_drains_gets_no_new_streams_until_it_serves_again(self) -> None:
        draining, other = Draining(), ScriptedEncoder()
        async with running(draining, other) as pool:
            await until_ready(pool, 2)
            await draining.set_serving(False)
            assert await until_ready(pool, 1) < 1.5
            assert set(await choices(pool)) == {other.target}
            await draining.set_serving(True)
            await until_ready(pool, 2)

    async def test_a_stream_of_one_that_drains_goes_on(self) -> None:
        draining = Draining()
        async with running(draining) as pool:
            await until_ready(pool, 1)
            stream = EncodeStream(pool.connections[0], pool.config, [PICTURE], HIDDEN_SIZE)
            await stream.open((), b"", 0, 0)
            await draining.set_serving(False)
            await until_ready(pool, 0)
            stream.grant([TileId(0, 0), TileId(0, 1)])
            tiles = stream.tiles(is_waiting=lambda: True)
            assert [(await anext(tiles)).tile.tile for _ in range(2)] == [0, 1]
            stream.close()


class Records:
    """What a name resolves to."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def look_up(self, host: str, port: int) -> list[str]:
        if not self.addresses:
            raise OSError("no such name")
        return list(self.addresses)


def named_pool(records: Records) -> EncoderPool:
    config = EncoderPoolConfig(encoders=("dns:///encoders.internal:50051",))
    return EncoderPool(config, FixedBase(), records.look_up)  # type: ignore[arg-type]


class TestNames:
    async def test_each_address_is_an_encoder(self) -> None:
        first, second = ScriptedEncoder(), ScriptedEncoder()
        async with encoders(first, second) as targets:
            pool = named_pool(Records(*targets))
            assert await pool.fingerprint() == FINGERPRINT  # resolves the name by itself
            assert pool.num_ready == 2 and set(await choices(pool)) == set(targets)
            await pool.close()

    async def test_one_that_joins_is_found_and_one_that_leaves_finishes_its_streams(self) -> None:
        first, second = ScriptedEncoder(), ScriptedEncoder()
        async with encoders(first, second):
            records = Records(first.target)
            pool = named_pool(records)
            pool.start()
            await until_ready(pool, 1)
            leaving = pool.connections[0]
            stream = EncodeStream(leaving, pool.config, [PICTURE], HIDDEN_SIZE)
            await stream.open((), b"", 0, 0)
            records.addresses = [second.target]
            pool.give_up(leaving)  # a reason to look again at once
            async with asyncio.timeout(10):
                while [connection.target for connection in pool.connections] != [second.target]:
                    await asyncio.sleep(0.01)
            await until_ready(pool, 1)
            assert set(await choices(pool)) == {second.target}
            stream.grant([TileId(0, 2)])
            arrived = await anext(stream.tiles(is_waiting=lambda: True))
            assert arrived.tile == TileId(0, 2)
            stream.close()
            async with asyncio.timeout(10):
                while pool._replicas.leaving:
                    await asyncio.sleep(0.01)
            await pool.close()

    async def test_one_that_stays_keeps_its_connection(self) -> None:
        records = Records("127.0.0.1:1", "127.0.0.1:2")
        pool = named_pool(records)
        with of_kind(Unavailable):
            await pool.fingerprint()
        stays = pool.connections[1]
        records.addresses = ["127.0.0.1:2", "127.0.0.1:3"]
        await pool._replicas.resolve(5)
        assert [connection.target for connection in pool.connections] == ["127.0.0.1:2", "127.0.0.1:3"]
        assert pool.connections[0] is stays
        await pool.close()

    async def test_a_name_that_nobody_knows_is_unavailable_without_the_name(self) -> None:
        pool = named_pool(Records())
        with of_kind(Unavailable, "encoder") as raised:
            await pool.fingerprint()
        assert "internal" not in raised.value.message
        await pool.close()


class TestFingerprint:
    async def test_only_an_encoder_with_that_of_the_hashes_is_chosen(self) -> None:
        """Encoders of two dtypes serve one checkpoint, but name their pictures differently."""
        async with pool_of(4) as pool:
            for connection in pool.connections[2:]:
                connection.model = EncoderModel(b"w" * 32)
            assert set(await choices(pool)) == {connection.target for connection in pool.connections[:2]}
            chosen = {(await pool.choose(b"w" * 32, content_hash)).target for content_hash in HASHES}
            assert chosen == {connection.target for connection in pool.connections[2:]}

    async def test_is_kept_while_any_encoder_has_it(self) -> None:
        async with pool_of(2) as pool:
            pool.connections[0].mark_dead()
            assert await pool.fingerprint() == FINGERPRINT
            pool.connections[0].model = EncoderModel(b"w" * 32)
            assert await pool.fingerprint() == FINGERPRINT
            pool.connections[1].mark_dead()
            assert await pool.fingerprint() == b"w" * 32

    async def test_another_checkpoint_is_reported_as_such(self) -> None:
        encoder = ScriptedEncoder()
        encoder.fingerprint = b"o" * 32
        async with running(encoder) as pool:
            for waiting in (pool.fingerprint(), pool.choose(FINGERPRINT, HASHES[0])):
                with of_kind(FingerprintMismatch):
                    await waiting
            assert pool.num_ready == 0

    async def test_one_with_another_checkpoint_is_not_used_beside_a_good_one(self) -> None:
        good, bad = ScriptedEncoder(), ScriptedEncoder()
        bad.fingerprint = b"o" * 32
        async with running(good, bad) as pool:
            await until_ready(pool, 1)
            assert set(await choices(pool)) == {good.target}

    async def test_is_remembered_while_no_encoder_is_there(self) -> None:
        encoder = ScriptedEncoder()
        async with running(encoder) as pool:
            assert await pool.fingerprint() == FINGERPRINT
            await encoder.stop()
            await until_ready(pool, 0)
            assert await pool.fingerprint() == FINGERPRINT
            with of_kind(Unavailable):
                await pool.choose(FINGERPRINT, HASHES[0])

    async def test_an_encoder_restarted_with_our_checkpoint_is_taken(self) -> None:
        encoder = ScriptedEncoder()
        encoder.fingerprint = b"o" * 32
        async with running(encoder) as pool:
            with of_kind(FingerprintMismatch):
                await pool.choose(FINGERPRINT, HASHES[0])
            encoder.fingerprint = FINGERPRINT
            await until_ready(pool, 1)


async def test_close_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with encoders(ScriptedEncoder()) as targets:
        between = asyncio.all_tasks()
        pool = make_pool(*targets)
        pool.start()
        await until_ready(pool, 1)
        await pool.close()
        assert {task for task in asyncio.all_tasks() - between if "poll" in str(task.get_coro())} == set()
    assert before <= asyncio.all_tasks()
