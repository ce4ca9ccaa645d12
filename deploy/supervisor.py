"""The three services as child processes: started, watched, restarted where that helps, never orphaned.

Knows command lines, ready lines and signals; knows nothing about models or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from deploy.progress import Progress

LAST_LINES = 30
MAX_LINE_BYTES = 1 << 20
READY_LINE = re.compile(r"tessera (\S+) ready on (\S+)")
# An encoder that dies again and again is started ever more rarely; one that lived this long counts as well.
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LIVED_WELL_S = 60.0
LOOPBACK_OF = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}


class PartFailed(Exception):
    """A service could not be started or died; the message holds its last log lines."""


@dataclass(frozen=True)
class Part:
    """One service: its name and what follows `tessera` on its command line."""

    name: str
    arguments: tuple[str, ...]


class Child:
    """A part's process, in a process group of its own so that Ctrl-C reaches only the parent."""

    def __init__(self, part: Part, tessera: Sequence[str], on_line: Callable[[str, str], None]) -> None:
        """`tessera` is the command that the part's arguments follow."""
        self.part = part
        self._tessera = tessera
        self.ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.started_at = time.monotonic()
        self._on_line = on_line
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._process: asyncio.subprocess.Process
        self._readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(*self._tessera, *self.part.arguments, "--exit-with-parent"),
            # Held open for life: the child ends when it closes, however this process ends.
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            process_group=0,
        )
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            self._readers.append(asyncio.create_task(self._read(stream)))

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def exited(self) -> str:
        """Wait for the end of the process; returns how it ended and its last log lines."""
        code = await self._process.wait()
        # A grandchild that outlives the child keeps the pipes open: do not wait for their end.
        await asyncio.wait(self._readers, timeout=0.5)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return "\n".join([f"{self.part.name} ended ({how})", *(f"  {line}" for line in self._last_lines)])

    async def until_ready(self) -> str:
        """The address in the ready line.  Raises PartFailed when the process ends before."""
        exited = asyncio.create_task(self.exited())
        try:
            await asyncio.wait({exited, self.ready}, return_when=asyncio.FIRST_COMPLETED)
            if self.ready.done():
                return self.ready.result()
            raise PartFailed(exited.result())
        finally:
            exited.cancel()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after the grace period; what is left of its group is killed."""
        if self.running:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        self.kill()
        await self._process.wait()
        await asyncio.wait(self._readers, timeout=0.5)

    def kill(self) -> None:
        """SIGKILL to the whole group, which may outlive its leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            found = READY_LINE.fullmatch(text)
            if found is None:
                self._last_lines.append(text)
                self._on_line(self.part.name, text)
            elif not self.ready.done():
                self.ready.set_result(found[2])


class Supervisor:
    """Parts in the order in which requests reach them last: encoder, language model, gateway."""

    def __init__(
        self,
        encoder: Part,
        llm: Part,
        gateway: Part,
        progress: Progress,
        grace_s: float,
        tessera: Sequence[str] = (sys.executable, "-m", "deploy"),
        health_timeout_s: float = 30.0,
        joining: Sequence[Part] = (),
        in_turn: bool = False,
        scheme: str = "http",
    ) -> None:
        """`joining` are started behind the language model, whose engine they share.

        `in_turn`: the language model starts when the encoder is ready. On one GPU it takes what is left.
        `scheme`: what the gateway speaks, "http" or "https".
        """
        self._encoder = encoder
        self._llm = llm
        self._gateway = gateway
        self._joining = tuple(joining)
        self._in_turn = in_turn
        self._progress = progress
        self._grace_s = grace_s
        self._tessera = tessera
        self._health_timeout_s = health_timeout_s
        self._children: dict[str, Child] = {}
        self.scheme = scheme

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they are started."""
        return (self._encoder, self._llm, *self._joining, self._gateway)

    async def start(self) -> str:
        """Start all; returns the gateway's address when requests can be answered.

        Raises:
            PartFailed: a part ended, or they do not find each other.
        """
        if self._in_turn:
            await self._start(self._encoder)
        slow_parts = (self._llm,) if self._in_turn else (self._encoder, self._llm)
        slow = [asyncio.create_task(self._start(part)) for part in slow_parts]
        try:
            await asyncio.gather(*slow)
        finally:
            for task in slow:
                task.cancel()
        for part in self._joining:
            await self._start(part)
        address = await self._start(self._gateway)
        await self._until_healthy(address)
        return address

    async def watch(self) -> None:
        """Restart the encoder whenever it ends; raises PartFailed when another part does."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_alive(self._encoder))
            for part in (self._llm, *self._joining, self._gateway):
                group.create_task(self._fail_with(self._children[part.name]))

    async def stop(self) -> None:
        """Stop in the order of a request, so that each can finish what it has begun."""
        for part in (self._gateway, *self._joining, self._llm, self._encoder):
            if part.name in self._children:
                await self._children[part.name].stop(self._grace_s)

    def kill(self) -> None:
        for child in self._children.values():
            child.kill()

    async def _start(self, part: Part) -> str:
        child = Child(part, self._tessera, self._progress.log_line)
        with self._progress.waiting(part.name) as step:
            await child.start()
            self._children[part.name] = child
            address = await child.until_ready()
            step.done(address)
        return address

    async def _until_healthy(self, address: str) -> None:
        deadline = time.monotonic() + self._health_timeout_s
        url, answer = f"{self.scheme}://{reachable(address)}/ready", ""
        with self._progress.waiting("health check") as step:
            # Our own child over loopback: its certificate is for the name that others know it by.
            async with httpx.AsyncClient(trust_env=False, verify=False) as client:
                while time.monotonic() < deadline:
                    with contextlib.suppress(httpx.HTTPError):
                        response = await client.get(url)
                        if response.is_success:
                            step.done("all parts answer")
                            return
                        answer = response.text
                    await asyncio.sleep(0.1)
        raise PartFailed(f"{url} was not ready within {self._health_timeout_s:.0f} s: {answer}")

    async def _keep_alive(self, part: Part) -> None:
        attempt = 0
        while True:
            child = self._children[part.name]
            self._progress.say(await child.exited())
            child.kill()
            lived_well = time.monotonic() - child.started_at > LIVED_WELL_S
            attempt = 0 if lived_well else min(attempt + 1, len(BACKOFF_S) - 1)
            await asyncio.sleep(BACKOFF_S[attempt])
            with contextlib.suppress(PartFailed):
                await self._start(part)

    async def _fail_with(self, child: Child) -> None:
        raise PartFailed(await child.exited())


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]


def reachable(address: str) -> str:
    """The address as this machine reaches it: a wildcard is no destination."""
    host, _, port = address.rpartition(":")
    return f"{LOOPBACK_OF.get(host, host)}:{port}"


async def run_until_stopped(supervisor: Supervisor, on_ready: Callable[[str], None]) -> None:
    """Start, watch, and stop at the first SIGINT, SIGTERM or SIGHUP; a second one kills.

    Raises:
        PartFailed: a part did not start, or died and is not restarted.
    """

    async def start_and_watch() -> None:
        on_ready(await supervisor.start())
        await supervisor.watch()

    work = asyncio.create_task(start_and_watch())
    signalled = False

    def on_signal() -> None:
        nonlocal signalled
        if signalled:
            supervisor.kill()
        signalled = True
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        await asyncio.wait([work])
    finally:
        await supervisor.stop()
    if not work.cancelled():
        _raise_first(work.exception())


def _raise_first(error: BaseException | None) -> None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
