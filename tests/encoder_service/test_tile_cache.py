from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from encoder_service.batcher import EncodedTile
from encoder_service.tile_cache import MOST_MOVING, TileCache, TileKey
from tests.encoder_service.wire import until

TILE_BYTES = 4 * 2 * 3


def key(number: int, salt: bytes = b"") -> TileKey:
    return (salt, b"a picture", number)


def embeds(number: int) -> torch.Tensor:
    return torch.full((2, 3), float(number))


def tile(number: int) -> EncodedTile:
    return EncodedTile(embeds(number), queue_ns=1, encode_ns=1, transfer_ns=1)


class Device:
    """Its memory is the host's; copies from it wait for `gate`, which is open at first."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.copied: list[int] = []
        self.num_to_fail = 0  # copies, of those that come next
        self._on_device: list[torch.Tensor] = []

    def tile(self, number: int) -> EncodedTile:
        self._on_device.append(embeds(number))
        return EncodedTile(embeds(number), 1, 1, 1, on_device=self._on_device[-1])

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.gate.wait(10)
        self.num_to_fail -= 1
        if self.num_to_fail >= 0:
            raise RuntimeError("secret of a library")
        self.copied.append(int(tensor[0, 0]))
        return tensor.clone() if any(tensor is other for other in self._on_device) else tensor


@asynccontextmanager
async def caching(
    host_tiles: float, device_tiles: float = 0, device: Device | None = None
) -> AsyncIterator[TileCache]:
    to_host = None if device is None else device.to_host
    cache = TileCache(int(host_tiles * TILE_BYTES), int(device_tiles * TILE_BYTES), to_host)
    try:
        yield cache
    finally:
        if device is not None:
            device.gate.set()
        await asyncio.to_thread(cache.close)


async def holds(cache: TileCache, number: int) -> bool:
    found = cache.find(key(number))
    if found is None:
        return False
    assert torch.equal(await found, embeds(number))
    return True


async def held(cache: TileCache, *numbers: int) -> list[int]:
    return [number for number in numbers if await holds(cache, number)]


class TestOnTheHost:
    async def test_a_tile_is_found_at_once_and_without_a_copy(self) -> None:
        async with caching(host_tiles=1) as cache:
            put = tile(5)
            cache.put(key(5), put)
            found = cache.find(key(5))
            assert found is not None and found.done() and found.result() is put.embeds

    async def test_the_least_recently_used_one_makes_room_and_what_was_given_out_stays(self) -> None:
        async with caching(host_tiles=3) as cache:
            for number in range(3):
                cache.put(key(number), tile(number))
            given = cache.find(key(1))
            await holds(cache, 0)
            cache.put(key(3), tile(3))  # 2 goes
            cache.put(key(4), tile(4))  # then 1
            assert await held(cache, 0, 1, 2, 3, 4) == [0, 3, 4]
            assert given is not None and torch.equal(given.result(), embeds(1))

    async def test_every_byte_is_counted(self) -> None:
        async with caching(host_tiles=2.9) as cache:
            for number in range(5):
                cache.put(key(number), tile(number))
                assert (
                    cache.host.used_bytes == len(cache.host) * TILE_BYTES == min(number + 1, 2) * TILE_BYTES
                )
            cache.put(key(4), tile(4))  # known
            assert cache.host.used_bytes == 2 * TILE_BYTES
            assert cache.host.num_evictions == 3

    async def test_a_large_tile_makes_room_for_itself_and_one_beyond_the_bound_for_nothing(self) -> None:
        async with caching(host_tiles=4) as cache:
            for number in range(4):
                cache.put(key(number), tile(number))
            cache.put(key(8), EncodedTile(torch.zeros(2, 9), 1, 1, 1))  # of three
            assert await held(cache, 0, 1, 2, 3) == [3]
            assert cache.host.used_bytes == 4 * TILE_BYTES
            cache.put(key(9), EncodedTile(torch.zeros(2, 15), 1, 1, 1))
            assert key(9) not in cache.host and cache.host.used_bytes == 4 * TILE_BYTES

    async def test_hits_and_misses_are_told_apart(self) -> None:
        async with caching(host_tiles=2) as cache:
            cache.put(key(0), tile(0))
            assert await held(cache, 0, 1, 0, 2, 0) == [0, 0, 0]
            assert (cache.host.num_hits, cache.device.num_hits, cache.num_misses) == (3, 0, 2)

    async def test_salt_picture_and_number_all_tell_tiles_apart(self) -> None:
        async with caching(host_tiles=9) as cache:
            cache.put((b"salt", b"picture", 1), tile(1))
            for other in ((b"", b"picture", 1), (b"salt", b"", 1), (b"salt", b"picture", 2)):
                assert cache.find(other) is None
            assert cache.find((b"salt", b"picture", 1)) is not None

    async def test_without_room_at_all_nothing_is_kept(self) -> None:
        async with caching(host_tiles=0) as cache:
            cache.put(key(0), tile(0))
            assert not await holds(cache, 0) and cache.host.used_bytes == 0


class TestOnADevice:
    async def test_what_the_device_evicts_moves_to_the_host_and_both_are_counted(self) -> None:
        device = Device()
        async with caching(2, 3, device) as cache:
            for number in range(4):
                cache.put(key(number), device.tile(number))
            await until(lambda: device.copied == [0])
            assert [key(number) in cache.host for number in range(4)] == [True, False, False, False]
            assert [key(number) in cache.device for number in range(4)] == [False, True, True, True]
            assert (cache.device.used_bytes, cache.host.used_bytes) == (3 * TILE_BYTES, TILE_BYTES)
            for number in range(4, 8):
                cache.put(key(number), device.tile(number))
            assert (cache.device.used_bytes, cache.host.used_bytes) == (3 * TILE_BYTES, 2 * TILE_BYTES)
            assert await held(cache, *range(8)) == [3, 4, 5, 6, 7]
            assert (cache.device.num_evictions, cache.host.num_evictions) == (5, 3)
            assert (cache.device.num_hits, cache.host.num_hits, cache.num_misses) == (3, 2, 3)

    async def test_a_hit_keeps_a_tile_on_the_device_and_is_copied_each_time(self) -> None:
        device = Device()
        async with caching(2, 2, device) as cache:
            for number in range(2):
                cache.put(key(number), device.tile(number))
            first, second = cache.find(key(0)), cache.find(key(0))
            assert first is not None and second is not None
            assert (await first).data_ptr() != (await second).data_ptr()
            cache.put(key(2), device.tile(2))  # 1 is the least recently used one
            assert key(0) in cache.device and key(1) in cache.host

    async def test_on_the_host_a_tile_has_memory_of_its_own_and_is_handed_out_without_a_copy(self) -> None:
        device = Device()
        async with caching(2, 0, device) as cache:
            made = device.tile(7)
            cache.put(key(7), made)
            await until(lambda: (found := cache.find(key(7))) is not None and found.done())
            found = cache.find(key(7))
            assert found is not None and found.done()
            assert found.result().data_ptr() not in (made.embeds.data_ptr(), made.on_device.data_ptr())
            assert torch.equal(found.result(), embeds(7))

    async def test_a_tile_that_is_moving_is_found(self) -> None:
        device = Device()
        async with caching(2, 0, device) as cache:
            device.gate.clear()
            cache.put(key(7), device.tile(7))
            found = cache.find(key(7))
            assert found is not None and not found.done()
            device.gate.set()
            assert torch.equal(await found, embeds(7))

    async def test_a_tile_evicted_from_the_host_while_it_moves_stays_evicted(self) -> None:
        device = Device()
        async with caching(1, 0, device) as cache:
            device.gate.clear()
            for number in range(2):
                cache.put(key(number), device.tile(number))
            device.gate.set()
            await until(lambda: device.copied == [0, 1])
            assert await held(cache, 0, 1) == [1]
            assert cache.host.used_bytes == TILE_BYTES

    async def test_a_move_that_fails_takes_nothing_from_a_tile_that_came_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        device = Device()
        async with caching(1, 0, device) as cache:
            device.gate.clear()
            device.num_to_fail = 1
            for number in (0, 1, 0):
                cache.put(key(number), device.tile(number))
            device.gate.set()
            await until(lambda: device.copied == [1, 0])
            assert await held(cache, 0, 1) == [0]
            assert cache.host.used_bytes == TILE_BYTES and len(caplog.records) == 1

    async def test_more_than_can_be_moved_is_dropped(self) -> None:
        device = Device()
        async with caching(1000, 0, device) as cache:
            device.gate.clear()
            for number in range(MOST_MOVING + 3):
                cache.put(key(number), device.tile(number))
            assert cache.host.used_bytes == MOST_MOVING * TILE_BYTES
            device.gate.set()
            await until(lambda: len(device.copied) == MOST_MOVING)
            await until(lambda: (found := cache.find(key(MOST_MOVING - 1))) is not None and found.done())
            cache.put(key(MOST_MOVING), device.tile(MOST_MOVING))
            assert await holds(cache, MOST_MOVING)

    async def test_a_tile_that_cannot_be_copied_is_forgotten(self, caplog: pytest.LogCaptureFixture) -> None:
        device = Device()
        async with caching(2, 1, device) as cache:
            device.num_to_fail = 2
            cache.put(key(0), device.tile(0))
            found = cache.find(key(0))
            assert found is not None
            with pytest.raises(RuntimeError):
                await found
            cache.put(key(1), device.tile(1))
            cache.put(key(2), device.tile(2))  # 1 cannot move
            await until(lambda: len(caplog.records) == 2)
            assert cache.find(key(0)) is None and cache.find(key(1)) is None
            assert (cache.device.used_bytes, cache.host.used_bytes) == (TILE_BYTES, 0)

    async def test_a_reader_that_leaves_takes_nothing_away(self) -> None:
        device = Device()
        async with caching(0, 1, device) as cache:
            cache.put(key(0), device.tile(0))
            device.gate.clear()
            for _ in range(2):  # one that is being copied, and one that waits for it
                found = cache.find(key(0))
                assert found is not None and found.cancel()
            await asyncio.sleep(0)
            device.gate.set()
            assert await holds(cache, 0)

    async def test_after_close_nothing_is_found_or_kept_and_who_waits_hears_of_it(self) -> None:
        device = Device()
        async with caching(2, 2, device) as cache:
            device.gate.clear()
            cache.put(key(0), device.tile(0))
            reads = [cache.find(key(0)) for _ in range(2)]
            closing = asyncio.create_task(asyncio.to_thread(cache.close))
            assert reads[1] is not None and reads[0] is not None
            with pytest.raises(asyncio.CancelledError):
                await reads[1]
            device.gate.set()
            await closing
            assert torch.equal(await reads[0], embeds(0))
            cache.put(key(1), device.tile(1))
            assert cache.find(key(0)) is None and key(1) not in cache.device
