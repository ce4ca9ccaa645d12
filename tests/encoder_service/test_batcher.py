from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import torch

from encoder_service.batch_size import BatchSizes
from encoder_service.batcher import EncodedTile, ForwardResult, TileBatcher
from protos.errors import ModelError, Unavailable

BAD = 255


class GatedEncoder:
    """Doubles its tiles, one forward per permission; fails on a batch that holds the tile BAD."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.permitted = threading.Semaphore(0)

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        batch = [int(tile[0, 0, 0]) for tile in tiles]
        self.batches.append(batch)
        self.entered.release()
        assert self.permitted.acquire(timeout=10)
        if BAD in batch:
            raise RuntimeError("secret of a library")
        return tiles.float() * 2

    def permit(self, forwards: int = 100) -> None:
        self.permitted.release(forwards)


def tile(value: int) -> torch.Tensor:
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)


@asynccontextmanager
async def busy_batcher(
    max_batch_tiles: int, max_wait_s: float = 60.0
) -> AsyncIterator[tuple[TileBatcher, GatedEncoder, asyncio.Future[EncodedTile]]]:
    """A batcher whose worker is inside a forward of tile 100, so that what is submitted waits."""
    encoder = GatedEncoder()
    batcher = TileBatcher(encoder, BatchSizes(max_batch_tiles, max_batch_tiles), max_wait_s)
    running = batcher.submit(tile(100), (0, 0))
    assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
    try:
        yield batcher, encoder, running
    finally:
        encoder.permit()
        await asyncio.to_thread(batcher.close)


async def test_each_tile_gets_its_own_embeds_from_one_forward() -> None:
    async with busy_batcher(max_batch_tiles=8) as (batcher, encoder, running):
        futures = [batcher.submit(tile(value), (0, 0)) for value in range(5)]
        assert batcher.tiles_queued == 5
        encoder.permit()
        results = await asyncio.gather(*futures)
        await running
        assert encoder.batches == [[100], [0, 1, 2, 3, 4]]
        assert [float(result.embeds[0, 0, 0]) for result in results] == [0, 2, 4, 6, 8]
        assert batcher.forwards_done == 2
        assert batcher.tiles_queued == 0


async def test_a_kept_tile_does_not_keep_its_batch_in_memory() -> None:
    async with busy_batcher(max_batch_tiles=8) as (batcher, encoder, _):
        futures = [batcher.submit(tile(value), (0, 0)) for value in range(4)]
        encoder.permit()
        embeds = (await asyncio.gather(*futures))[0].embeds
        assert embeds.untyped_storage().nbytes() == embeds.nbytes


async def test_the_time_in_the_queue_and_in_the_forward_are_told_apart() -> None:
    async with busy_batcher(max_batch_tiles=8) as (batcher, encoder, running):
        future = batcher.submit(tile(1), (0, 0))
        await asyncio.sleep(0.05)
        encoder.permit(1)
        await running
        await asyncio.sleep(0.02)
        encoder.permit()
        encoded = await future
        assert encoded.queue_ns >= 50_000_000
        assert 20_000_000 <= encoded.encode_ns < 5_000_000_000


async def test_batches_never_exceed_their_bound() -> None:
    async with busy_batcher(max_batch_tiles=3) as (batcher, encoder, _):
        futures = [batcher.submit(tile(value), (0, 0)) for value in range(7)]
        encoder.permit()
        await asyncio.gather(*futures)
        assert encoder.batches[1:] == [[0, 1, 2], [3, 4, 5], [6]]


async def test_first_tiles_of_all_pictures_go_before_second_ones() -> None:
    async with busy_batcher(max_batch_tiles=2) as (batcher, encoder, _):
        futures = [batcher.submit(tile(10 + index), (0, index)) for index in range(3)]
        futures += [batcher.submit(tile(20 + index), (0, index)) for index in range(2)]
        futures += [batcher.submit(tile(30), (0, 0))]
        encoder.permit()
        await asyncio.gather(*futures)
        assert encoder.batches[1:] == [[10, 20], [30, 11], [21, 12]]


async def test_a_lower_priority_value_goes_before_all_tiles_of_a_higher_one() -> None:
    async with busy_batcher(max_batch_tiles=2) as (batcher, encoder, _):
        futures = [batcher.submit(tile(10), (0, 0))]
        futures += [batcher.submit(tile(20 + index), (-1, index)) for index in range(2)]
        encoder.permit()
        await asyncio.gather(*futures)
        assert encoder.batches[1:] == [[20, 21], [10]]


async def test_a_waiting_tile_may_be_hastened_and_never_slowed_down() -> None:
    async with busy_batcher(max_batch_tiles=1) as (batcher, encoder, running):
        futures = [batcher.submit(tile(10 + index), (0, index)) for index in range(3)]
        batcher.hasten(futures[2], (-1, 2))
        batcher.hasten(futures[0], (7, 0))
        batcher.hasten(running, (-9, 0))  # a forward has taken it
        encoder.permit()
        results = await asyncio.gather(*futures)
        assert encoder.batches[1:] == [[12], [10], [11]]
        assert [float(result.embeds[0, 0, 0]) for result in results] == [20, 22, 24]


async def test_an_aged_tile_is_not_starved_by_new_first_tiles() -> None:
    async with busy_batcher(max_batch_tiles=1, max_wait_s=0.05) as (batcher, encoder, _):
        aged = batcher.submit(tile(19), (9, 9))
        await asyncio.sleep(0.06)
        fresh = [batcher.submit(tile(value), (0, 0)) for value in range(3)]
        encoder.permit()
        await asyncio.gather(aged, *fresh)
        assert encoder.batches[1:] == [[19], [0], [1], [2]]


async def test_without_age_the_same_tile_goes_last() -> None:
    async with busy_batcher(max_batch_tiles=1, max_wait_s=60) as (batcher, encoder, _):
        late = batcher.submit(tile(19), (9, 9))
        fresh = [batcher.submit(tile(value), (0, 0)) for value in range(3)]
        encoder.permit()
        await asyncio.gather(late, *fresh)
        assert encoder.batches[1:] == [[0], [1], [2], [19]]


async def test_a_cancelled_waiting_tile_is_never_encoded() -> None:
    async with busy_batcher(max_batch_tiles=8) as (batcher, encoder, _):
        kept, dropped = batcher.submit(tile(1), (0, 0)), batcher.submit(tile(2), (0, 0))
        dropped.cancel()
        await until(lambda: batcher.tiles_queued == 1)
        encoder.permit()
        await kept
        assert encoder.batches[1:] == [[1]]


async def test_a_tile_cancelled_inside_its_forward_disturbs_nobody() -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    async with busy_batcher(max_batch_tiles=8) as (batcher, encoder, running):
        running.cancel()
        encoder.permit()
        encoded = await batcher.submit(tile(3), (0, 0))
        assert float(encoded.embeds[0, 0, 0]) == 6
    assert problems == []


async def test_a_failing_forward_fails_its_own_tiles_only() -> None:
    async with busy_batcher(max_batch_tiles=2) as (batcher, encoder, running):
        failing = [batcher.submit(tile(BAD), (0, 0)), batcher.submit(tile(1), (0, 0))]
        later = batcher.submit(tile(2), (0, 0))
        encoder.permit()
        results = await asyncio.gather(*failing, return_exceptions=True)
        assert [type(result) for result in results] == [ModelError, ModelError]
        assert "secret" not in str(results[0])
        assert float((await running).embeds[0, 0, 0]) == 200
        assert float((await later).embeds[0, 0, 0]) == 4
        assert batcher.forwards_done == 3


async def test_close_fails_waiting_tiles_ends_the_running_one_and_refuses_new_ones() -> None:
    encoder = GatedEncoder()
    batcher = TileBatcher(encoder, BatchSizes(1, 1))
    running = batcher.submit(tile(1), (0, 0))
    assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
    waiting = batcher.submit(tile(2), (0, 0))
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    with pytest.raises(Unavailable):
        await waiting
    assert not closing.done()
    encoder.permit()
    await closing
    assert float((await running).embeds[0, 0, 0]) == 2
    assert encoder.batches == [[1]]
    with pytest.raises(Unavailable):
        batcher.submit(tile(3), (0, 0))


async def test_close_does_not_wait_for_a_tower_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    encoder = GatedEncoder()
    batcher = TileBatcher(encoder, BatchSizes(1, 1))
    running = batcher.submit(tile(1), (0, 0))
    assert batcher.is_busy
    assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)
    await asyncio.to_thread(batcher.close, timeout_s=0.01)
    assert "has not ended" in caplog.text and batcher.is_busy
    encoder.permit()
    await running
    await asyncio.to_thread(batcher.close)
    assert not batcher.is_busy


def test_a_result_for_a_closed_event_loop_does_not_stop_the_worker() -> None:
    encoder = GatedEncoder()
    batcher = TileBatcher(encoder, BatchSizes(1, 1))

    async def abandon() -> None:
        batcher.submit(tile(1), (0, 0))
        assert await asyncio.to_thread(encoder.entered.acquire, timeout=5)

    async def ask() -> float:
        return float((await batcher.submit(tile(2), (0, 0))).embeds[0, 0, 0])

    asyncio.run(abandon())
    encoder.permit()
    assert asyncio.run(ask()) == 4
    batcher.close()


class QueueingDevice:
    """Takes forwards into its queue at once; each ends, in order, when permitted."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.permitted = threading.Semaphore(0)
        self.fails_to_begin = False

    def launch(self, tiles: Sequence[torch.Tensor]) -> QueuedForward:
        if self.fails_to_begin:
            raise RuntimeError("secret of a library")
        self.batches.append([int(tile[0, 0, 0]) for tile in tiles])
        return QueuedForward(self, list(tiles))


class QueuedForward:
    def __init__(self, device: QueueingDevice, tiles: list[torch.Tensor]) -> None:
        self.device, self.tiles = device, tiles

    def result(self) -> ForwardResult:
        assert self.device.permitted.acquire(timeout=10)
        if any(int(tile[0, 0, 0]) == BAD for tile in self.tiles):
            raise RuntimeError("secret of a library")
        embeds = [tile.float() * 2 for tile in self.tiles]
        return ForwardResult(embeds, encode_ns=3, transfer_ns=2, on_device=[value + 1 for value in embeds])


@asynccontextmanager
async def queueing_batcher(
    max_batch_tiles: int, first_batch_tiles: int | None = None
) -> AsyncIterator[tuple[TileBatcher, QueueingDevice]]:
    def never(tiles: torch.Tensor) -> torch.Tensor:
        raise AssertionError("forwards are launched")

    device = QueueingDevice()
    sizes = BatchSizes(first_batch_tiles or max_batch_tiles, max_batch_tiles)
    batcher = TileBatcher(never, sizes, 60.0, device.launch)
    try:
        yield batcher, device
    finally:
        device.permitted.release(100)
        await asyncio.to_thread(batcher.close)


async def test_a_device_has_the_next_forward_in_its_queue_and_no_further_one() -> None:
    async with queueing_batcher(max_batch_tiles=2) as (batcher, device):
        futures = [batcher.submit(tile(0), (0, 0))]
        await until(lambda: device.batches == [[0]])
        futures += [batcher.submit(tile(value), (0, 0)) for value in range(1, 7)]
        await until(lambda: len(device.batches) == 2)
        await asyncio.sleep(0.02)
        assert (len(device.batches), batcher.forwards_done) == (2, 0)
        device.permitted.release()
        await until(lambda: len(device.batches) == 3)
        assert float((await futures[0]).embeds[0, 0, 0]) == 0
        device.permitted.release(100)
        results = await asyncio.gather(*futures)
        assert [float(result.embeds[0, 0, 0]) for result in results] == [2 * value for value in range(7)]
        assert [value for batch in device.batches for value in batch] == list(range(7))
        assert (results[0].encode_ns, results[0].transfer_ns) == (3, 2)
        on_device = [float(result.on_device[0, 0, 0]) for result in results if result.on_device is not None]
        assert on_device == [2 * value + 1 for value in range(7)]


async def test_the_first_forward_of_an_idle_device_may_be_smaller() -> None:
    async with queueing_batcher(max_batch_tiles=8, first_batch_tiles=3) as (batcher, device):
        with batcher._changed:  # all of them at once
            futures = [batcher.submit(tile(value), (0, 0)) for value in range(13)]
        await until(lambda: len(device.batches) == 2)
        assert list(map(len, device.batches)) == [3, 8]
        device.permitted.release(100)
        await asyncio.gather(*futures)
        assert list(map(len, device.batches)) == [3, 8, 2]


async def test_forwards_that_do_not_begin_and_those_that_fail_later_fail_their_own_tiles_only() -> None:
    async with queueing_batcher(max_batch_tiles=1) as (batcher, device):
        device.permitted.release(100)
        failing = batcher.submit(tile(BAD), (0, 0))
        with pytest.raises(ModelError):
            await failing
        device.fails_to_begin = True
        with pytest.raises(ModelError):
            await batcher.submit(tile(1), (0, 0))
        device.fails_to_begin = False
        assert float((await batcher.submit(tile(2), (0, 0))).embeds[0, 0, 0]) == 4
        assert batcher.forwards_done == 3


async def test_close_waits_for_every_forward_in_the_devices_queue() -> None:
    device = QueueingDevice()
    batcher = TileBatcher(lambda tiles: tiles, BatchSizes(1, 1), launch=device.launch)
    futures = [batcher.submit(tile(value), (0, 0)) for value in range(2)]
    await until(lambda: len(device.batches) == 2)
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    await asyncio.sleep(0.02)
    assert not closing.done()
    device.permitted.release(2)
    await closing
    assert [float((await future).embeds[0, 0, 0]) for future in futures] == [0, 2]
