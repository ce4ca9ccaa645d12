"""What an engine leaves behind that did not get to run; engines that run are in test_engine_process.py."""

import asyncio
import os
from pathlib import Path

import pytest

from llm_service.config import EngineConfig
from llm_service.engine_processes import EngineProcesses
from protos.errors import Unavailable

CONFIG = EngineConfig(device="cpu", tensor_parallel_size=2)


def ranks():
    """Engine processes of this one, alive or not yet waited for."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in children if b"engine_process" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def test_engines_have_sockets_of_their_own_unless_one_is_named(tmp_path):
    first, second = EngineProcesses("nowhere", CONFIG), EngineProcesses("nowhere", CONFIG)
    named = EngineProcesses("nowhere", CONFIG, str(tmp_path / "named.sock"))
    assert first.socket_path != second.socket_path
    assert first.socket_path.parent.stat().st_mode & 0o077 == 0, "for this user alone"
    assert named.socket_path == tmp_path / "named.sock"
    for processes in (first, second, named):
        await processes.stop()
    assert not first.socket_path.parent.exists() and tmp_path.exists()


@pytest.mark.slow
async def test_a_start_that_failed_leaves_neither_processes_nor_files(tmp_path, capfd):
    processes = EngineProcesses(str(tmp_path / "nowhere"), CONFIG)
    with pytest.raises(Unavailable, match="ended while it was starting"):
        await asyncio.wait_for(processes.start(), 60)
    assert ranks() == [] and not processes.socket_path.parent.exists()
    assert "error: " in capfd.readouterr().err
    await asyncio.wait_for(processes.wait(), 20)
    await processes.stop()


@pytest.mark.slow
async def test_stopping_in_the_middle_of_the_start_ends_all_ranks(tmp_path):
    processes = EngineProcesses(str(tmp_path / "nowhere"), CONFIG)
    starting = asyncio.create_task(processes.start())
    async with asyncio.timeout(30):
        while len(ranks()) < CONFIG.tensor_parallel_size:
            await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await asyncio.wait_for(processes.stop(), 30)
    assert ranks() == [] and not processes.socket_path.parent.exists()
