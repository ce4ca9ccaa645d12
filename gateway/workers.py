"""Several processes behind one port: the parent binds, starts, watches and stops them.

The kernel spreads connections over the workers' sockets (SO_REUSEPORT).  Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.config import GatewayConfig
from protos.errors import Unavailable

READY_LINE = b"ready\n"
# On top of what running requests get.
STOP_MARGIN_S = 5.0

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket.  Raises OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}") from error
    return listener


def bind_many(host: str, port: int, count: int) -> list[socket.socket]:
    """Sockets of one port, for one process each.

    Raises:
        OSError: the address is taken, also by somebody who would share it, or not ours.
    """
    # The first is bound alone and shares only then: two gateways must not share a port by mistake.
    listeners = [bind(host, port)]
    port = listeners[0].getsockname()[1]
    listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for _ in range(count - 1):
        listener = socket.socket(listeners[0].family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listeners.append(listener)
    return listeners


class Workers:
    """The worker processes of one gateway.  They die with this one: their stdin is a pipe that we hold."""

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self, listeners: list[socket.socket]) -> None:
        """Return when all listen; takes ownership of the sockets.

        Raises:
            Unavailable: one ended before; its own message is on stderr.
        """
        for index, listener in enumerate(listeners):
            with listener:
                self._processes.append(await self._spawn(index, listener.fileno()))
        for process in self._processes:
            assert process.stdout is not None
            if await process.stdout.readline() != READY_LINE:
                raise Unavailable("a gateway worker ended while it was starting; see its message above")

    async def wait(self) -> None:
        """Return as soon as any has ended."""
        tasks = [asyncio.create_task(process.wait()) for process in self._processes]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def signal(self, number: int) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def stop(self) -> None:
        """Let running requests finish; kills what does not end by itself."""
        self.signal(signal.SIGTERM)
        exits = [asyncio.create_task(process.wait()) for process in self._processes]
        if exits:
            await asyncio.wait(exits, timeout=self._config.shutdown_grace_s + STOP_MARGIN_S)
        self.signal(signal.SIGKILL)
        await asyncio.gather(*exits)

    async def _spawn(self, index: int, listener: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(listener,),
            start_new_session=True,  # Ctrl-C is for us, who pass it on
        )
        settings: dict[str, Any] = {
            "config": asdict(self._config),
            "listener": listener,
            "folder": str(self._folder),
            "index": index,
            "log_level": logging.getLevelName(logging.getLogger().getEffectiveLevel()),
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        with suppress(ConnectionError):  # ended already: `start` will notice
            await process.stdin.drain()
        return process


async def serve_workers(config: GatewayConfig, on_ready: Callable[[int], None]) -> None:
    """As `gateway.app.serve`, in `config.gateway_workers` processes.

    Raises:
        OSError: the address is taken or not ours.
        Unavailable: a worker ended.
    """
    listeners = bind_many(config.host, config.port, config.gateway_workers)
    port = listeners[0].getsockname()[1]
    stop = asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="tessera-gateway-") as folder:
        workers = Workers(config, Path(folder))

        def on_signal(number: int) -> None:
            stop.set()
            workers.signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        try:
            await workers.start(listeners)
            log.info("listening on %s:%d with %d workers", config.host, port, config.gateway_workers)
            on_ready(port)
            await workers.wait()
            if not stop.is_set():
                raise Unavailable("a gateway worker ended; see its message above")
        finally:
            await workers.stop()
