"""Decoder processes are killed when they must be, replaced, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from encoder_service.container_limits import ContainerLimits
from encoder_service.containers import Containers
from encoder_service.decode_job import StoredPart
from encoder_service.decoder_processes import MAX_JOBS
from protos.errors import InvalidRequest, Overloaded
from protos.media import FrameSampling, MediaKind
from tests.encoder_service.wire import until
from tests.media_files import numbered_frames, video

MP4 = video(numbered_frames(10))
FIELD = "media[0].data"


class Harness:
    """Containers, and what they have left of processes and descriptors."""

    def __init__(self, **limits: Any) -> None:
        self.containers = Containers(ContainerLimits(**limits))

    @property
    def pids(self) -> list[int]:
        return self.containers.processes.pids

    async def open(self, data: bytes = MP4) -> tuple[str, tuple[StoredPart, ...]]:
        return await self.containers.open(MediaKind.VIDEO, data, FrameSampling(), FIELD)

    async def read(self, data: bytes = MP4) -> int:
        """Frames that came."""
        format, parts = await self.open(data)
        return len((await self.containers.read(format, data, parts, FIELD)).images())

    async def stopped_process(self) -> int:
        """An idle process that takes a job and does nothing about it."""
        await self.open()
        [pid] = self.pids
        os.kill(pid, signal.SIGSTOP)
        return pid


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    with nothing_left():
        made = Harness(open_timeout_s=20)
        yield made
        pids = made.pids
        made.containers.close()
        assert not [pid for pid in pids if is_alive(pid)]


@contextmanager
def nothing_left() -> Iterator[None]:
    before = num_descriptors()
    yield
    assert num_descriptors() <= before


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


async def refusal(awaitable: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await awaitable
    assert caught.value.field == FIELD
    return caught.value.message


async def test_one_process_serves_job_after_job(harness: Harness) -> None:
    assert [await harness.read() for _ in range(3)] == [8, 8, 8]
    assert len(harness.pids) == 1


async def test_files_at_fault_leave_their_process_alone(harness: Harness) -> None:
    await harness.open()
    before = harness.pids
    await refusal(harness.open(MP4[:500]))
    assert harness.pids == before and await harness.read() == 8


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGXCPU])
async def test_a_crash_is_the_error_of_one_file_and_of_no_other(harness: Harness, number: int) -> None:
    pid = await harness.stopped_process()
    hit = asyncio.create_task(harness.open())
    await until(lambda: len(harness.pids) == 1 and not harness.containers.processes._idle)
    other = asyncio.create_task(harness.read())
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    assert await refusal(hit) == "the file made its decoder fail"
    assert await other == 8
    assert pid not in harness.pids and not is_alive(pid)


async def test_a_late_job_is_refused_and_its_process_killed() -> None:
    with nothing_left():
        harness = Harness(open_timeout_s=0.5)
        await until_started(harness)
        [pid] = harness.pids
        os.kill(pid, signal.SIGSTOP)
        assert await refusal(harness.open()) == "the file takes longer than 0.5 s to decode"
        await until(lambda: not is_alive(pid))
        assert harness.pids == []
        harness.containers.close()


async def until_started(harness: Harness) -> None:
    """Imports do not count as the job's time, but a busy machine may be late for half a second of it."""
    for _ in range(20):
        try:
            await harness.open()
        except InvalidRequest:
            continue
        return


async def test_a_cancelled_job_kills_its_process_at_once(harness: Harness) -> None:
    pid = await harness.stopped_process()
    running = asyncio.create_task(harness.open())
    await until(lambda: not harness.containers.processes._idle)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not is_alive(pid))
    assert harness.pids == [] and await harness.read() == 8


async def test_a_process_that_died_while_idle_is_replaced(harness: Harness) -> None:
    await harness.open()
    [pid] = harness.pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not harness.containers.processes._idle[0].is_alive)
    assert await harness.read() == 8
    assert pid not in harness.pids


async def test_a_process_is_replaced_before_it_grows_old(harness: Harness) -> None:
    await harness.open()
    [pid] = harness.pids
    for _ in range(MAX_JOBS - 1):
        await harness.open()
    assert pid not in harness.pids
    assert await harness.read() == 8


async def test_a_long_decode_does_not_hold_up_headers() -> None:
    harness = Harness(decode_processes=1, open_timeout_s=20)
    format, parts = await harness.open()
    os.kill(harness.pids[0], signal.SIGSTOP)
    decoding = asyncio.create_task(harness.containers.read(format, MP4, parts, FIELD))
    await until(lambda: not harness.containers.processes._idle)
    assert await harness.open() == (format, parts)
    decoding.cancel()
    await asyncio.wait([decoding])
    harness.containers.close()


async def test_a_full_service_says_so() -> None:
    harness = Harness(decode_processes=1, open_timeout_s=0.2)
    semaphore = harness.containers.processes._opening
    async with semaphore:
        with pytest.raises(Overloaded) as caught:
            await harness.open()
    assert caught.value.retry_after_s
    harness.containers.close()


async def test_a_file_that_waits_for_a_process_is_not_copied_yet(harness: Harness) -> None:
    processes, before = harness.containers.processes, num_descriptors()
    async with AsyncExitStack() as stack:
        for _ in range(ContainerLimits().decode_processes):
            await stack.enter_async_context(processes._opening)
        waiting = asyncio.create_task(harness.open())
        await until(lambda: bool(processes._opening._waiters))
        assert num_descriptors() == before
    assert (await waiting)[0] == "mov"


async def test_memory_has_a_limit() -> None:
    harness = Harness(decode_memory_mib=24, open_timeout_s=20)
    large = video([Image.effect_noise((2000, 2000), 60).convert("RGB")] * 2)
    assert await refusal(harness.read(large))
    harness.containers.close()


async def test_processes_end_with_their_parent(harness: Harness) -> None:
    """Also when they are busy: the socket's end is enough."""
    await harness.open()
    [pid] = harness.pids
    harness.containers.processes._idle[0]._socket.close()
    await until(lambda: not is_alive(pid))
