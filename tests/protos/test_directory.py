"""Which addresses are behind the names, as they come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protos import directory
from protos.directory import Directory, Replica, look_up

NAME = "dns:///encoders.internal:50051"


class Records:
    """What a name resolves to; changed by the tests."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.fails = False
        self.asked: list[tuple[str, int]] = []

    async def look_up(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        if self.fails:
            raise OSError("no such name")
        return list(self.addresses)


@asynccontextmanager
async def following(records: Records, *targets: str) -> AsyncIterator[tuple[Directory, list[list[str]]]]:
    """A directory that is started, and what it said."""
    said: list[list[str]] = []
    it = Directory(targets, lambda found: said.append([one.address for one in found]), records.look_up)
    it.start()
    try:
        yield it, said
    finally:
        await it.close()


async def until_asked(records: Records, count: int) -> None:
    async with asyncio.timeout(20):
        while len(records.asked) < count:
            await asyncio.sleep(0.01)


async def test_static_addresses_need_no_resolver() -> None:
    records = Records()
    async with following(records, "a:1", "[::1]:2", "unix:///run/x", "a:1") as (it, said):
        assert [one.address for one in it.replicas] == ["a:1", "[::1]:2", "unix:///run/x"]
        assert {one.server_name for one in it.replicas} == {""}
        await it.resolve(5)
    assert records.asked == [] and said == []


@pytest.mark.parametrize("target", [NAME, "dns:encoders.internal:50051"])
async def test_a_name_is_all_its_addresses(target: str) -> None:
    records = Records("10.0.0.2:50051", "[fd00::1]:50051", "10.0.0.2:50051")
    async with following(records, "a:1", target) as (it, said):
        await it.resolve(5)
        assert it.replicas[1:] == [
            Replica("10.0.0.2:50051", "encoders.internal"),
            Replica("[fd00::1]:50051", "encoders.internal"),
        ]
    assert records.asked == [("encoders.internal", 50051)]
    assert said == [["a:1", "10.0.0.2:50051", "[fd00::1]:50051"]]


async def test_a_failure_is_a_reason_to_look_again() -> None:
    records = Records("10.0.0.1:1")
    async with following(records, NAME) as (it, said):
        await until_asked(records, 1)
        records.addresses = ["10.0.0.3:1", "10.0.0.1:1"]
        it.hurry()
        await until_asked(records, 2)
        await it.resolve(5)
    assert said[0] == ["10.0.0.1:1"] and said[-1] == ["10.0.0.1:1", "10.0.0.3:1"]


async def test_failures_do_not_flood_the_resolver() -> None:
    records = Records("10.0.0.1:1")
    async with following(records, NAME) as (it, _):
        start = asyncio.get_running_loop().time()
        while len(records.asked) < 3:
            it.hurry()
            await asyncio.sleep(0.01)
        elapsed = asyncio.get_running_loop().time() - start
    assert elapsed >= 2 * directory.MIN_RESOLVE_INTERVAL_S * 0.95


async def test_the_same_answer_in_another_order_is_no_news() -> None:
    records = Records("10.0.0.1:1", "10.0.0.2:1")
    async with following(records, NAME) as (it, said):
        await it.resolve(5)
        records.addresses.reverse()
        await it.resolve(5)
    assert len(said) == 1


@pytest.mark.parametrize("answer", ["failure", "nothing"])
async def test_a_name_that_cannot_be_resolved_keeps_its_addresses(answer: str) -> None:
    records = Records("10.0.0.1:1")
    async with following(records, NAME) as (it, said):
        await it.resolve(5)
        records.fails, records.addresses = answer == "failure", []
        await it.resolve(5)
        assert [one.address for one in it.replicas] == ["10.0.0.1:1"] and len(said) == 1


async def test_a_resolver_that_hangs_does_not_hold_up_those_who_ask() -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    it = Directory([NAME], lambda found: None, hang)
    async with asyncio.timeout(5):
        await it.resolve(0.01)
        await it.close()


@pytest.mark.parametrize(
    "target", ["dns:///name", "dns:///:1", "dns:///name:http", "dns://8.8.8.8/name:1", "dns:"]
)
async def test_a_malformed_name_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=target):
        Directory([target], lambda found: None)


async def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1:7" in await look_up("localhost", 7)
    assert await look_up("::1", 7) == ["[::1]:7"]
    with pytest.raises(OSError):
        await look_up("no-such-name.invalid", 7)
    with pytest.raises(OSError):
        await look_up("x" * 64 + ".invalid", 7)
