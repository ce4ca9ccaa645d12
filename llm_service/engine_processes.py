"""Starts the engine's processes, one a rank, and watches over them."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from llm_service.config import EngineConfig
from llm_service.engine_process import READY_LINE, EngineSettings
from protos.errors import Unavailable

STOP_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class EngineProcesses:
    """The engine of one model.  Its processes die with this one: their stdin is a pipe that we hold."""

    def __init__(self, model: str, config: EngineConfig, socket_path: str = "") -> None:
        self._model = model
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="tessera-engine-")
        self.socket_path = Path(socket_path or Path(self._folder.name) / "engine.sock")
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """Return when front ends may connect.

        Raises:
            Unavailable: a rank ended before it was ready; its own message is on stderr.
        """
        for rank in range(self._config.tensor_parallel_size):
            self._processes.append(await self._spawn(rank))
        ready = asyncio.create_task(self._read_ready())
        died = asyncio.create_task(self.wait())
        await asyncio.wait((ready, died), return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not (ready.done() and ready.result()):
            ready.cancel()
            await self.stop()
            raise Unavailable("the engine ended while it was starting; see its message above")

    async def wait(self) -> None:
        """Return as soon as any rank has ended."""
        tasks = [asyncio.create_task(process.wait()) for process in self._processes]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def stop(self) -> None:
        """End all ranks; kills what does not end by itself."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._folder.cleanup()

    async def _spawn(self, rank: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "llm_service.engine_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if rank == 0 else None,
            start_new_session=True,  # Ctrl-C is for us; we end the engine when the requests have ended
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._settings(rank)) + b"\n")
        with suppress(ConnectionError):  # ended already: `start` will notice
            await process.stdin.drain()
        return process

    def _settings(self, rank: int) -> EngineSettings:
        folder = Path(self._folder.name)
        return EngineSettings(
            model=self._model,
            engine=self._config,
            rank=rank,
            socket_path=str(self.socket_path),
            ranks_path=str(folder / "ranks.sock"),
            rendezvous_path=str(folder / "rendezvous"),
            log_level=logging.getLevelName(logging.getLogger().getEffectiveLevel()),
        )

    async def _read_ready(self) -> bool:
        stdout = self._processes[0].stdout
        assert stdout is not None
        return (await stdout.readline()).decode().strip() == READY_LINE
