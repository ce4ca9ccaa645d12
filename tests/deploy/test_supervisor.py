"""Real child processes: started, watched, restarted, stopped in order, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from deploy.progress import Progress
from deploy.supervisor import Part, PartFailed, Supervisor, free_ports, reachable, run_until_stopped

SCRIPTED = (sys.executable, "-m", "tests.deploy.scripted_part")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "log"
    file.touch()
    monkeypatch.setenv("TESSERA_TEST_LOG", str(file))
    return file


def supervisor_of(
    out: TextIO, grace_s: float = 5.0, health_timeout_s: float = 10.0, **behaviour: str
) -> Supervisor:
    parts = [
        Part(name, (name, *filter(None, [behaviour.get(name)]))) for name in ("encoder", "llm", "gateway")
    ]
    return Supervisor(parts[0], parts[1], parts[2], Progress(out), grace_s, SCRIPTED, health_timeout_s)


def pids(log: Path, pattern: str = r"\w+ (?:started|has child) (\d+)") -> list[int]:
    return [int(number) for number in re.findall(pattern, log.read_text())]


def is_running(pid: int) -> bool:
    """False for zombies too: in a container nobody may reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


async def test_all_parts_start_and_stop_in_the_order_of_a_request(log: Path) -> None:
    out = io.StringIO()
    supervisor = supervisor_of(out)
    address = await supervisor.start()
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    await supervisor.stop()
    lines = log.read_text().splitlines()
    assert sorted(line.split()[0] for line in lines[:2]) == ["encoder", "llm"]
    assert lines[2].startswith("gateway started")
    assert lines[3:] == [
        f"{name} {what}" for name in ("gateway", "llm", "encoder") for what in ("asked to stop", "stopped")
    ]
    for expected in ("encoder", "llm", "gateway", "health check"):
        assert re.search(rf"^{expected} +ready after +\d+\.\d s ", out.getvalue(), re.MULTILINE)
    assert "encoder | encoder says hello" in out.getvalue()


async def test_joining_parts_start_behind_the_language_model_and_stop_before_it(log: Path) -> None:
    encoder, llm, joined, gateway = (Part(name, (name,)) for name in ("encoder", "llm", "llm-1", "gateway"))
    out = io.StringIO()
    supervisor = Supervisor(encoder, llm, gateway, Progress(out), 5.0, SCRIPTED, 10.0, joining=[joined])
    await supervisor.start()
    [joined_pid] = pids(log, r"llm-1 started (\d+)")
    watching = asyncio.create_task(supervisor.watch())
    await asyncio.sleep(0.1)
    assert not watching.done()
    os.kill(joined_pid, signal.SIGKILL)
    with pytest.raises(BaseExceptionGroup) as raised:
        await watching
    assert raised.group_contains(PartFailed, match="llm-1 ended")
    await supervisor.stop()
    lines = log.read_text().splitlines()
    started = [line.split()[0] for line in lines if " started" in line]
    assert sorted(started[:2]) == ["encoder", "llm"] and started[2:] == ["llm-1", "gateway"]
    stopped = [line.split()[0] for line in lines if line.endswith(" stopped")]
    assert stopped == ["gateway", "llm", "encoder"]


async def test_in_turn_the_language_model_waits_for_the_encoder(log: Path) -> None:
    encoder, llm, gateway = (
        Part(name, (name, *more)) for name, *more in (("encoder", "dies early"), ("llm",), ("gateway",))
    )
    supervisor = Supervisor(encoder, llm, gateway, Progress(io.StringIO()), 5.0, SCRIPTED, in_turn=True)
    with pytest.raises(PartFailed, match="encoder ended"):
        await supervisor.start()
    await supervisor.stop()
    assert "encoder started" in log.read_text() and "llm started" not in log.read_text()


async def test_a_part_that_dies_while_starting_fails_the_start_with_its_last_lines(log: Path) -> None:
    supervisor = supervisor_of(io.StringIO(), llm="dies early")
    with pytest.raises(PartFailed) as failed:
        await supervisor.start()
    await supervisor.stop()
    assert str(failed.value).splitlines() == [
        "llm ended (exit code 1)",
        "  llm says hello",
        "  cannot listen on anything",
    ]
    assert not any(map(is_running, pids(log)))


async def test_parts_that_do_not_find_each_other_fail_the_start(log: Path) -> None:
    supervisor = supervisor_of(io.StringIO(), health_timeout_s=0.3, gateway="unhealthy")
    with pytest.raises(PartFailed, match=r"/ready was not ready within 0 s"):
        await supervisor.start()
    await supervisor.stop()


async def test_an_encoder_that_dies_is_started_again(log: Path) -> None:
    out = io.StringIO()
    supervisor = supervisor_of(out, encoder="dies later")
    await supervisor.start()
    watching = asyncio.create_task(supervisor.watch())
    await until(lambda: len(pids(log, r"encoder started (\d+)")) >= 3)
    assert not watching.done()
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await supervisor.stop()
    assert "encoder ended (signal SIGKILL)" in out.getvalue()
    assert not any(map(is_running, pids(log)))


@pytest.mark.parametrize("part", ["llm", "gateway"])
async def test_the_death_of_another_part_stops_everything(log: Path, part: str) -> None:
    supervisor = supervisor_of(io.StringIO(), **{part: "dies later"})
    addresses: list[str] = []
    with pytest.raises(PartFailed, match=rf"^{part} ended \(signal SIGKILL\)"):
        await asyncio.wait_for(run_until_stopped(supervisor, addresses.append), 20)
    assert len(addresses) == 1
    assert not any(map(is_running, pids(log)))


async def test_a_part_that_ignores_sigterm_is_killed_with_its_children(log: Path) -> None:
    supervisor = supervisor_of(io.StringIO(), grace_s=0.3, llm="stubborn")
    await supervisor.start()
    await asyncio.wait_for(supervisor.stop(), 10)
    assert "llm asked to stop" in log.read_text() and "llm stopped" not in log.read_text()
    assert not any(map(is_running, pids(log)))


async def test_a_grandchild_does_not_outlive_a_part_that_died(log: Path) -> None:
    supervisor = supervisor_of(io.StringIO(), llm="child")
    await supervisor.start()
    (grandchild,) = pids(log, r"has child (\d+)")
    assert is_running(grandchild)
    os.kill(pids(log, r"llm started (\d+)")[0], signal.SIGKILL)
    await asyncio.wait_for(supervisor.stop(), 10)
    await until(lambda: not is_running(grandchild))


SUPERVISE = """
import asyncio, sys
from tests.deploy.test_supervisor import supervisor_of
from deploy.supervisor import run_until_stopped
supervisor = supervisor_of(sys.stderr)
asyncio.run(run_until_stopped(supervisor, lambda address: print(address, flush=True)))
"""


@pytest.fixture
def supervising(log: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_stops_all_and_is_a_clean_end(
    supervising: subprocess.Popen[str], log: Path, number: signal.Signals
) -> None:
    supervising.send_signal(number)
    assert supervising.wait(timeout=10) == 0
    assert log.read_text().count("stopped") == 3
    assert not any(map(is_running, pids(log)))


async def test_no_part_outlives_a_supervisor_that_is_killed(
    supervising: subprocess.Popen[str], log: Path
) -> None:
    assert sum(map(is_running, pids(log))) == 3
    supervising.kill()
    supervising.wait()
    await until(lambda: not any(map(is_running, pids(log))))
    assert log.read_text().count("stopped") == 3


def test_free_ports_are_different_ones() -> None:
    assert len(set(free_ports(20))) == 20


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0:80", "127.0.0.1:80"),
        (":::80", "[::1]:80"),
        ("10.1.2.3:80", "10.1.2.3:80"),
        ("host.example:80", "host.example:80"),
    ],
)
def test_a_wildcard_is_reached_over_loopback(address: str, expected: str) -> None:
    assert reachable(address) == expected
