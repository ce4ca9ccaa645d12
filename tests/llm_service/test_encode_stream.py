"""One Encode call against a real server: what is asked for, what is refused, and who counts as dead."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch

from llm_service.config import EncoderPoolConfig
from llm_service.encode_stream import EncodeStream
from llm_service.encoder_pool import EncoderConnection
from llm_service.picture import Picture, TileId
from protos import encoder_pb2, tensor_pb2
from protos.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    Overloaded,
    Unavailable,
)
from protos.frames import EncodeEvent, TileFrame
from protos.options import MAX_CHUNK_BYTES
from protos.ring import PAGE_BYTES
from tests.llm_service.scripted_encoder import (
    FINGERPRINT,
    HIDDEN_SIZE,
    NUM_SLOTS,
    WELL_BEHAVED,
    EncoderSide,
    FixedBase,
    Script,
    ScriptedEncoder,
    bad_medium,
    beating,
    done,
    encoders,
    hang,
    heartbeat,
    in_slots,
    make_picture,
    refuses,
    serve_grants,
    small_ring,
    tile_values,
)

PICTURES = [make_picture(b"a cat"), make_picture(b"a dog", max_tiles=4, use_thumbnail=False)]
OTHER_PICTURE = encoder_pb2.MediumLayout(content_hash=b"x" * 32, tokens_per_tile=[4], final=True)
METADATA = (("x-request-id", "r-1"), ("traceparent", "00-1-2-03"))


@dataclass
class Line:
    """A stream and the encoder at its other end."""

    stream: EncodeStream
    encoder: ScriptedEncoder
    connection: EncoderConnection

    async def open(self, initial_credit: int = 0) -> None:
        await self.stream.open(METADATA, b"salt", 3, initial_credit)

    async def read(self, count: int, is_waiting: bool = True) -> list[tuple[TileId, torch.Tensor]]:
        tiles: list[tuple[TileId, torch.Tensor]] = []
        async for arrived in self.stream.tiles(lambda: is_waiting):
            tiles.append((arrived.tile, arrived.embeds.clone()))
            assert arrived.is_whole()
            if len(tiles) == count:
                break
        return tiles

    @property
    def side(self) -> EncoderSide:
        return self.encoder.sides[-1]


@asynccontextmanager
async def line(
    script: Script = WELL_BEHAVED,
    pictures: list[Picture] = PICTURES,
    num_tiles: int = 3,
    has_ring: bool = False,
    has_substitute: Callable[[], bool] = lambda: True,
    **config: Any,
) -> AsyncIterator[Line]:
    """With `has_ring` the encoder has a ring, and it is mapped.

    Afterwards nothing may be left: no stream counted, no task, no call at the encoder.
    """
    before = asyncio.all_tasks()
    rings = ExitStack()
    ring = rings.enter_context(small_ring(has_ring))
    encoder = ScriptedEncoder(script, num_tiles, ring)
    async with encoders(encoder) as [target]:
        settings = EncoderPoolConfig(encoders=(target,), **config)
        connection = EncoderConnection(target, settings, FixedBase())  # type: ignore[arg-type]
        await connection.poll()
        await until(lambda: ring is None or connection.ring is not None)
        stream = EncodeStream(connection, settings, pictures, HIDDEN_SIZE, has_substitute)
        try:
            yield Line(stream, encoder, connection)
        finally:
            stream.close()
            stream.close()
            assert connection.streams_open == 0
            await assert_ended(encoder)
            await assert_no_tasks_but(before, of="encode_stream")
            await connection.close()
            rings.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def assert_ended(encoder: ScriptedEncoder, seconds: float = 1.0) -> None:
    """Every call has been cancelled or has ended at the server."""
    async with asyncio.timeout(seconds):
        for side in encoder.sides:
            await side.ended.wait()


async def assert_no_tasks_but(before: set[asyncio.Task[Any]], of: str = "") -> None:
    """No task of ours, nor gRPC's that sends our messages, is left a moment later."""
    for _ in range(100):
        left = [task for task in asyncio.all_tasks() - before if is_ours(task)]
        if not left:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"tasks are left: {left}")


def is_ours(task: asyncio.Task[Any]) -> bool:
    name = getattr(task.get_coro(), "__qualname__", "")
    owners = ("EncodeStream", "Encoding", "EncoderConnection._poll_now", "Generation", "_StreamRequestMixin")
    return name.startswith(owners)


def of_kind(error: type[Exception], match: str | None = None) -> Any:
    """Exactly this class: a subclass would be handled in another way."""
    return pytest.raises(error, match=match, check=lambda raised: type(raised) is error)


class TestLayout:
    async def test_says_the_tokens_of_each_tile(self) -> None:
        async with line() as it:
            layouts = await it.stream.open(METADATA, b"", 0, 0)
            assert [layout.tokens_per_tile for layout in layouts] == [(4, 4, 4)] * 2
            assert layouts[0].num_tokens == 12
            assert it.stream.is_open

    async def test_everything_that_open_announces_arrives(self) -> None:
        async with line() as it:
            await it.open(initial_credit=2)
            opening = it.side.opening
            assert opening.request_id == "r-1"
            assert it.side.metadata["traceparent"] == "00-1-2-03"
            assert (opening.cache_salt, opening.priority, opening.initial_credit) == (b"salt", 3, 2)
            assert opening.expected_fingerprint == FINGERPRINT
            assert tensor_pb2.DTYPE_BFLOAT16 in opening.payload_dtypes
            assert list(opening.transports) == [encoder_pb2.TRANSPORT_INLINE]
            tiling = [(m.tiling.min_tiles, m.tiling.max_tiles, m.tiling.use_thumbnail) for m in opening.media]
            assert tiling == [(1, 12, True), (1, 4, False)]
            assert [bytes(data) for data in it.side.media] == [b"a cat", b"a dog"]

    async def test_large_pictures_travel_in_chunks(self) -> None:
        data = bytes(range(256)) * (5 * MAX_CHUNK_BYTES // 512)  # two chunks and a half
        async with line(pictures=[make_picture(data), make_picture(b"")]) as it:
            await it.open()
            assert [bytes(medium) for medium in it.side.media] == [data, b""]

    @pytest.mark.parametrize(
        "changes",
        [
            {"media": []},
            {
                "media": [encoder_pb2.MediumLayout(content_hash=b"x" * 32, tokens_per_tile=[4], final=True)]
                * 2
            },
            {"hidden_size": HIDDEN_SIZE + 1},
            {"dtype": tensor_pb2.DTYPE_UNSPECIFIED},
            {"dtype": tensor_pb2.DTYPE_FLOAT8_E4M3},
        ],
        ids=["no media", "wrong hash", "hidden size", "no dtype", "a dtype that was not offered"],
    )
    async def test_a_layout_that_does_not_fit_is_refused(self, changes: dict[str, Any]) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(**changes)
            await hang()

        async with line(script) as it:
            with of_kind(Unavailable):
                await it.open()

    @pytest.mark.parametrize("change", ["not final", "no tiles"])
    async def test_a_layout_that_may_still_change_is_refused(self, change: str) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            layout = side.layout()
            for medium in layout.layout.media:
                medium.final = change != "not final"
                if change == "no tiles":
                    del medium.tokens_per_tile[:]
            yield layout
            await hang()

        async with line(script) as it:
            with of_kind(Unavailable, "not final"):
                await it.open()

    @pytest.mark.parametrize("first", [heartbeat(), done()], ids=["heartbeat", "done"])
    async def test_anything_before_the_layout_breaks_the_protocol(self, first: EncodeEvent) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield first
            await hang()

        async with line(script) as it:
            with of_kind(Unavailable, "no layout"):
                await it.open()

    async def test_a_tile_before_the_layout_breaks_the_protocol(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.tile(TileId(0, 0))
            await hang()

        async with line(script) as it:
            with of_kind(Unavailable, "no layout"):
                await it.open()

    async def test_it_has_a_deadline(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            await hang()
            yield heartbeat()

        async with line(script, layout_timeout_s=0.2) as it:
            start = time.monotonic()
            with of_kind(Unavailable, "in time"):
                await it.open()
            assert time.monotonic() - start < 1

    async def test_cancelling_while_waiting_for_it_is_no_failure_of_the_encoder(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            await hang()
            yield heartbeat()

        async with line(script) as it:
            opening = asyncio.create_task(it.open())
            await asyncio.sleep(0.1)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening


class TestGrants:
    async def test_what_is_granted_at_once_is_one_message_in_order(self) -> None:
        async with line() as it:
            await it.open()
            it.stream.grant([TileId(1, 2)])
            it.stream.grant([TileId(0, 1), TileId(0, 0)])
            tiles = await it.read(3)
        assert [tile for tile, _ in tiles] == [TileId(1, 2), TileId(0, 1), TileId(0, 0)]
        assert it.side.granted == [tile for tile, _ in tiles] and it.side.grants == 1
        assert torch.equal(tiles[0][1], tile_values(b"a dog", 2))
        assert torch.equal(tiles[2][1], tile_values(b"a cat", 0))

    async def test_what_is_granted_later_is_a_message_of_its_own(self) -> None:
        async with line() as it:
            await it.open()
            for number in range(2):
                it.stream.grant([TileId(0, number)])
                assert [tile for tile, _ in await it.read(1)] == [TileId(0, number)]
        assert it.side.grants == 2

    async def test_credited_tiles_come_without_a_grant_and_are_not_granted_again(self) -> None:
        async with line() as it:
            await it.open(initial_credit=4)
            it.stream.grant([TileId(0, 0), TileId(1, 0)])
            it.stream.grant([TileId(1, 1)])
            tiles = await it.read(5)
            assert [tile for tile, _ in tiles] == [*it.side.credited(), TileId(1, 1)]
            assert it.side.granted == [TileId(1, 1)]

    async def test_a_tile_on_its_way_is_not_granted_again_but_one_that_came_is(self) -> None:
        async with line() as it:
            await it.open()
            it.stream.grant([TileId(0, 0)])
            it.stream.grant([TileId(0, 0)])
            it.stream.grant([TileId(0, 1)])
            assert [tile for tile, _ in await it.read(2)] == [TileId(0, 0), TileId(0, 1)]
            assert it.side.granted == [TileId(0, 0), TileId(0, 1)]
            it.stream.grant([TileId(0, 0)])  # the engine's store had to drop it
            assert [tile for tile, _ in await it.read(1)] == [TileId(0, 0)]

    async def test_half_close_ends_with_done(self) -> None:
        async with line() as it:
            await it.open(initial_credit=2)
            it.stream.half_close()
            it.stream.half_close()
            assert not it.stream.is_open
            assert len(await it.read(99)) == 2
            assert it.side.is_half_closed

    async def test_a_payload_in_half_precision_is_read_as_such(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(dtype=tensor_pb2.DTYPE_BFLOAT16)
            payload = memoryview(b"\x80\x3f" * 4)
            yield TileFrame(encoder_pb2.Tile(num_tokens=4), payload)
            await hang()

        async with line(script) as it:
            it.connection.payload_dtype = tensor_pb2.DTYPE_BFLOAT16
            await it.open(initial_credit=1)
            [(_, embeds)] = await it.read(1)
            assert embeds.dtype is torch.bfloat16 and embeds.tolist() == [[1.0]] * 4


def after_layout(*events: EncodeEvent) -> Script:
    """Layout, the credited tile (0, 0), and then these."""

    async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
        await side.read_pictures()
        yield side.layout()
        yield side.tile(TileId(0, 0))
        for event in events:
            yield event
        if not events:
            return
        await hang()

    return script


def frame(medium: int, tile: int, size: int = 16) -> TileFrame:
    header = encoder_pb2.Tile(medium=medium, tile=tile, num_tokens=4)
    return TileFrame(header, memoryview(b"\0" * size))


def second_tile_in(slot: int) -> encoder_pb2.EncodeResponse:
    return in_slots(encoder_pb2.Tile(tile=1, num_tokens=4, slot=slot))


class TestBrokenProtocol:
    @pytest.mark.parametrize(
        "script",
        [
            after_layout(frame(0, 3)),
            after_layout(frame(2, 0)),
            after_layout(frame(0, 1, size=15)),
            after_layout(frame(0, 1, size=32)),
            after_layout(frame(0, 1, size=0)),
            after_layout(frame(0, 0)),
            after_layout(frame(1, 2)),
            after_layout(TileFrame(encoder_pb2.Tile(tile=1, num_tokens=3), memoryview(bytes(16)))),
            after_layout(TileFrame(encoder_pb2.Tile(tile=1, num_tokens=4, slot=0), memoryview(b""))),
            after_layout(second_tile_in(0)),
            after_layout(done()),
            after_layout(),
        ],
        ids=[
            "tile index",
            "medium index",
            "payload short",
            "payload long",
            "payload empty",
            "tile twice",
            "tile nobody asked for",
            "number of tokens",
            "a slot without a ring",
            "slots without a ring",
            "early done",
            "early end with OK",
        ],
    )
    async def test_is_a_failure_of_the_encoder(self, script: Script) -> None:
        async with line(script) as it:
            await it.open(initial_credit=2)
            with of_kind(Unavailable, "encoder"):
                await it.read(99)

    @pytest.mark.parametrize("slot", [NUM_SLOTS, 255, (1 << 32) - 1])
    async def test_a_slot_that_the_ring_has_not(self, slot: int) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(transport=encoder_pb2.TRANSPORT_SHARED_MEMORY)
            yield second_tile_in(slot)
            await hang()

        async with line(script, has_ring=True) as it:
            await it.open(initial_credit=3)
            with of_kind(Unavailable, "malformed"):
                await it.read(99)

    async def test_a_tile_larger_than_its_slot(self) -> None:
        num_tokens = PAGE_BYTES // torch.float32.itemsize + 1

        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            layout = side.layout(transport=encoder_pb2.TRANSPORT_SHARED_MEMORY)
            for medium in layout.layout.media:
                medium.tokens_per_tile[:] = [num_tokens]
            yield layout
            yield in_slots(encoder_pb2.Tile(num_tokens=num_tokens, slot=0))
            await hang()

        async with line(script, has_ring=True) as it:
            await it.open(initial_credit=1)
            with of_kind(Unavailable, "malformed"):
                await it.read(99)

    async def test_done_after_the_half_close_but_with_tiles_missing(self) -> None:
        async with line(after_layout(done())) as it:
            await it.open(initial_credit=2)
            it.stream.half_close()
            with of_kind(Unavailable, "too early"):
                await it.read(99)


async def one_slot_each(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    """Credited tiles, from the last slot to the first; and Done after the half-close."""
    await side.read_pictures()
    yield side.layout(transport=encoder_pb2.TRANSPORT_SHARED_MEMORY)
    for number, tile in enumerate(side.credited(), 1):
        yield in_slots(side.tile_in_slot(tile, NUM_SLOTS - number))
    while await side.next_grant() is not None:
        pass
    yield done()


async def waits_for_the_half_close(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    await side.read_pictures()
    yield side.layout()
    while await side.next_grant() is not None:
        pass
    for tile in side.credited():
        yield side.tile(tile)
    yield done()


class TestRing:
    async def test_one_that_is_mapped_is_named_and_its_tiles_are_right(self) -> None:
        async with line(beating(one_slot_each), has_ring=True) as it:
            await it.open(initial_credit=2)
            opening = it.side.opening
            assert it.connection.ring is not None and opening.ring_nonce == it.connection.ring.nonce
            assert encoder_pb2.TRANSPORT_SHARED_MEMORY in opening.transports
            tiles = await it.read(2)
            assert [tile for tile, _ in tiles] == [TileId(0, 0), TileId(0, 1)]
            for tile, embeds in tiles:
                assert torch.equal(embeds, tile_values(b"a cat", tile.tile))

    async def test_several_tiles_of_one_message_go_back_together(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(transport=encoder_pb2.TRANSPORT_SHARED_MEMORY)
            yield in_slots(*(side.tile_in_slot(TileId(0, tile), tile) for tile in range(3)))
            assert await side.next_grant() == [] and side.returned == [0, 1, 2]
            yield side.tile(TileId(1, 0))
            await hang()

        async with line(beating(script), has_ring=True) as it:
            await it.open(initial_credit=4)
            assert len(await it.read(4)) == 4

    async def test_a_slot_is_returned_once_its_tile_has_been_read(self) -> None:
        async with line(beating(one_slot_each), has_ring=True) as it:
            await it.open(initial_credit=2)
            tiles = it.stream.tiles(lambda: True)
            await anext(tiles)
            await asyncio.sleep(0.05)
            assert it.side.returned == []
            await anext(tiles)
            await until(lambda: it.side.returned == [3])

    async def test_the_half_close_comes_after_the_last_return(self) -> None:
        async with line(beating(one_slot_each), has_ring=True) as it:
            await it.open(initial_credit=2)
            it.stream.half_close()
            tiles = it.stream.tiles(lambda: True)
            for returned in ([], [3]):
                await anext(tiles)
                await asyncio.sleep(0.05)
                assert it.side.returned == returned and not it.side.is_half_closed
            assert [tile async for tile in tiles] == []
            assert it.side.returned == [3, 2] and it.side.is_half_closed

    async def test_without_one_the_half_close_comes_at_once(self) -> None:
        async with line(beating(waits_for_the_half_close)) as it:
            await it.open(initial_credit=2)
            it.stream.half_close()
            assert len(await it.read(99)) == 2

    async def test_one_that_the_encoder_does_not_know_is_dropped(self) -> None:
        """It has restarted meanwhile; there is nothing to return to it."""
        async with line(beating(waits_for_the_half_close), has_ring=True) as it:
            await it.open(initial_credit=2)
            assert it.side.opening.ring_nonce and it.connection.ring is None
            it.stream.half_close()
            assert len(await it.read(99)) == 2

    async def test_an_overwritten_tile_is_not_whole_and_still_due(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(transport=encoder_pb2.TRANSPORT_SHARED_MEMORY)
            yield in_slots(*(side.tile_in_slot(TileId(0, tile), tile) for tile in range(2)))
            side.overwrite(0, b"another tile")
            yield done()

        async with line(script, has_ring=True) as it:
            await it.open(initial_credit=2)
            it.stream.half_close()
            await asyncio.sleep(0.1)
            tiles = it.stream.tiles(lambda: True)
            assert not (await anext(tiles)).is_whole() and it.stream.num_due == 2
            assert (await anext(tiles)).is_whole() and it.stream.num_due == 1
            with of_kind(Unavailable, "too early"):
                await anext(tiles)

    async def test_closing_while_tiles_are_due_after_the_half_close(self) -> None:
        """`line` asserts that no task is left."""
        async with line(beating(one_slot_each), has_ring=True) as it:
            await it.open(initial_credit=1)
            it.stream.half_close()
            await asyncio.sleep(0.05)
            assert not it.side.is_half_closed


class TestStatuses:
    @pytest.mark.parametrize(
        "error",
        [
            bad_medium(1),
            Overloaded("too many streams", retry_after_s=2.5),
            FingerprintMismatch("another checkpoint"),
            DeadlineExceeded("the stream's upload stalled"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("when", ["before the layout", "between tiles"])
    async def test_what_the_encoder_refuses_is_raised_as_it_said(self, error: Any, when: str) -> None:
        async def late(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            yield side.tile(TileId(0, 0))
            raise error

        async with line(refuses(error) if when == "before the layout" else late) as it:
            with of_kind(type(error)) as raised:
                await it.open(initial_credit=2)
                await it.read(99)
            assert raised.value.message == error.message
            assert raised.value.field == error.field
            assert raised.value.retry_after_s == error.retry_after_s

    async def test_a_server_that_cancels_the_call_does_not_cancel_us(self) -> None:
        class Cancelling(ScriptedEncoder):
            async def Encode(self, requests: Any, context: Any) -> AsyncIterator[EncodeEvent]:
                await context.abort(grpc.StatusCode.CANCELLED, "10.0.0.7: server going away")
                yield heartbeat()

        async with encoders(Cancelling()) as [target]:
            config = EncoderPoolConfig(encoders=(target,))
            connection = EncoderConnection(target, config, FixedBase())  # type: ignore[arg-type]
            stream = EncodeStream(connection, config, PICTURES, HIDDEN_SIZE)
            with of_kind(Unavailable, "encoder") as raised:
                await stream.open((), b"", 0, 0)
            assert "10.0.0.7" not in raised.value.message
            stream.close()
            await connection.close()

    @pytest.mark.parametrize("num_read", [0, 1, 3])
    async def test_a_refusal_during_the_upload_is_not_overwritten_by_the_failed_write(
        self, num_read: int
    ) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            for _ in range(num_read):
                await anext(side.requests)
            raise bad_medium(0, "too large")
            yield heartbeat()

        for _ in range(4):  # without the precaution three of four come as INTERNAL
            async with line(script, pictures=[make_picture(b"\1" * (8 << 20))]) as it:
                with of_kind(InvalidRequest, "too large"):
                    await it.open()

    async def test_an_encoder_that_stops_during_the_upload_is_unavailable(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await anext(side.requests)
            await hang()
            yield heartbeat()

        async with line(script, pictures=[make_picture(b"\1" * (16 << 20))]) as it:
            opening = asyncio.create_task(it.open())
            await asyncio.sleep(0.2)
            await it.encoder.stop()
            with of_kind(Unavailable, "encoder"):
                await opening

    async def test_a_bug_of_the_encoder_shows_nothing_of_it(self) -> None:
        async with line(refuses(KeyError("/home/somebody/model"))) as it:
            with of_kind(ModelError, "encoder") as raised:
                await it.open()
            assert "somebody" not in raised.value.message

    async def test_a_refusal_of_our_own_messages_is_not_the_callers_fault(self) -> None:
        error = InvalidRequest("slot 3 is not on its way", field="grant.slots")
        async with line(refuses(error)) as it:
            with of_kind(ModelError, "encoder"):
                await it.open()

    async def test_nobody_there_is_unavailable_and_names_no_address(self) -> None:
        config = EncoderPoolConfig(encoders=("127.0.0.1:1",))
        connection = EncoderConnection("127.0.0.1:1", config, FixedBase())  # type: ignore[arg-type]
        stream = EncodeStream(connection, config, PICTURES, HIDDEN_SIZE)
        with of_kind(Unavailable) as raised:
            await stream.open((), b"", 0, 0)
        assert "127.0.0.1" not in raised.value.message
        stream.close()
        await connection.close()


async def silent_after_layout(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    await side.read_pictures()
    yield side.layout()
    await hang()


class TestWatchdog:
    async def test_a_silent_encoder_is_dead_after_the_heartbeat_timeout(self) -> None:
        async with line(silent_after_layout) as it:
            await it.open()
            start = time.monotonic()
            with of_kind(Unavailable, "stopped answering"):
                await it.read(1)
            assert 0.5 < time.monotonic() - start < 1.0

    async def test_one_without_a_substitute_is_waited_for_ten_times_as_long(self) -> None:
        async with line(silent_after_layout, heartbeat_timeout_s=0.25, has_substitute=lambda: False) as it:
            await it.open()
            start = time.monotonic()
            with of_kind(Unavailable, "stopped answering"):
                await it.read(1)
            assert 2.4 < time.monotonic() - start

    async def test_the_wait_for_the_only_one_ends_when_another_is_there(self) -> None:
        others: list[str] = []
        async with line(silent_after_layout, has_substitute=lambda: bool(others)) as it:
            await it.open()
            reading = asyncio.create_task(it.read(1))
            await asyncio.wait([reading], timeout=1.2)
            assert not reading.done()
            others.append("another")
            with of_kind(Unavailable, "stopped answering"):
                await reading

    async def test_also_when_no_tile_is_missed(self) -> None:
        async with line(silent_after_layout) as it:
            await it.open()
            with of_kind(Unavailable, "stopped answering"):
                await it.read(1, is_waiting=False)

    async def test_heartbeats_keep_it_alive_when_no_tile_is_missed(self) -> None:
        async with line(heartbeat_timeout_s=0.6, tile_timeout_s=0.3) as it:
            await it.open()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.2):
                    await it.read(1, is_waiting=False)

    async def test_our_own_busy_loop_is_not_the_encoders_fault(self) -> None:
        async with line() as it:
            await it.open()
            reading = asyncio.create_task(it.read(1))
            for _ in range(3):
                await asyncio.sleep(0.05)
                time.sleep(1.0)
            it.stream.grant([TileId(0, 0)])
            assert [tile for tile, _ in await reading] == [TileId(0, 0)]

    async def test_a_loop_that_is_always_late_still_notices_a_dead_encoder(self) -> None:
        async def dawdle() -> None:
            while True:
                time.sleep(0.08)
                await asyncio.sleep(0)

        async with line(silent_after_layout) as it:
            await it.open()
            dawdler = asyncio.create_task(dawdle())
            with of_kind(Unavailable, "stopped answering"):
                async with asyncio.timeout(5):
                    await it.read(1)
            dawdler.cancel()

    async def test_a_tile_that_takes_too_long_is_a_deadline_not_a_dead_encoder(self) -> None:
        async with line(beating(silent_after_layout), tile_timeout_s=0.9) as it:
            await it.open()
            it.stream.grant([TileId(0, 0)])
            start = time.monotonic()
            with of_kind(DeadlineExceeded, "too long for a tile"):
                await it.read(1)
            assert 0.8 < time.monotonic() - start < 1.5

    async def test_each_tile_has_its_own_time(self) -> None:
        async def slow(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            for tile in range(3):
                await asyncio.sleep(0.5)
                yield side.tile(TileId(0, tile))
            async for event in serve_grants(side, []):
                yield event

        async with line(beating(slow), tile_timeout_s=0.8) as it:
            await it.open(initial_credit=3)
            assert len(await it.read(3)) == 3

    async def test_a_cancellation_that_meets_its_verdict_is_still_a_cancellation(self) -> None:
        async with line(silent_after_layout) as it:
            await it.open()
            reading = asyncio.create_task(it.read(1))
            verdict_s = 0.0
            while not verdict_s:  # cancel in the very iteration in which the watchdog cancels the call
                await asyncio.sleep(0)
                if it.stream._verdict is not None:
                    verdict_s = time.monotonic()
                    reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading


class TestMemory:
    @pytest.mark.parametrize("script", [WELL_BEHAVED, refuses(bad_medium(0))], ids=["answers", "refuses"])
    async def test_a_closed_stream_is_freed_without_the_collector(self, script: Script) -> None:
        async with encoders(ScriptedEncoder(script)) as [target]:
            config = EncoderPoolConfig(encoders=(target,))
            connection = EncoderConnection(target, config, FixedBase())  # type: ignore[arg-type]
            gc.collect()
            gc.disable()
            try:
                stream = EncodeStream(connection, config, PICTURES, HIDDEN_SIZE)
                with suppress(InvalidRequest):
                    await stream.open((), b"", 0, 1)
                stream.close()
                freed = weakref.ref(stream)
                del stream
                await asyncio.sleep(0.2)
                assert freed() is None
            finally:
                gc.enable()
                await connection.close()


class TestClose:
    """`line` asserts each time that the call ends at the server and that no task is left."""

    async def test_before_it_was_opened(self) -> None:
        async with line() as it:
            assert it.connection.streams_open == 1
            it.stream.close()
            assert it.connection.streams_open == 0

    async def test_while_a_picture_of_16_mib_is_uploaded(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await anext(side.requests)
            await anext(side.requests)
            await hang()  # takes no more: the upload stands still in flow control
            yield heartbeat()

        async with line(script, pictures=[make_picture(b"\1" * (16 << 20))]) as it:
            opening = asyncio.create_task(it.open())
            await asyncio.sleep(0.3)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    async def test_between_tiles(self) -> None:
        async with line() as it:
            await it.open(initial_credit=2)
            await it.read(1)

    async def test_after_the_half_close(self) -> None:
        async with line() as it:
            await it.open()
            it.stream.half_close()

    async def test_after_an_error_of_the_encoder_while_the_upload_runs(self) -> None:
        async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await anext(side.requests)
            raise InvalidRequest("too large", field="media[0].data")
            yield heartbeat()

        async with line(script, pictures=[make_picture(b"\1" * (16 << 20))]) as it:
            with of_kind(InvalidRequest):
                await it.open()

    async def test_after_an_error_when_nothing_was_left_to_send(self) -> None:
        async with line(refuses(bad_medium(0))) as it:
            with of_kind(InvalidRequest):
                await it.open()
