"""Decoder processes: started when they are needed, killed when a job is late, cancelled or ends them.

Knows processes and shared memory; what a job means is `decode_job`'s business.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from encoder_service import metrics
from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import MAX_PACKET_BYTES, READY, Answer, Job
from protos.errors import InvalidRequest, ModelError, Overloaded

RETRY_AFTER_S = 1.0
# Importing FFmpeg's and PDFium's bindings, on a slow and busy machine.
START_TIMEOUT_S = 30.0
# Libraries may lose memory with hostile files.
MAX_JOBS = 256
PIECE_BYTES = 1 << 20

log = logging.getLogger(__name__)


class ProcessEnded(Exception):
    """Crashed, ran out of its limits, or said what makes no sense."""


class DecoderProcesses:
    """At most `decode_processes` jobs that read headers and as many that decode, at a time.

    Of either kind: a queue of long decodes must not hold up the layout of other requests.
    """

    def __init__(self, limits: ContainerLimits) -> None:
        self._limits = limits
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._opening = asyncio.Semaphore(limits.decode_processes)
        self._reading = asyncio.Semaphore(limits.decode_processes)

    @property
    def pids(self) -> list[int]:
        """Of those that are there."""
        return [process.pid for process in (*self._idle, *self._busy)]

    async def open(self, job: Job, data: bytes, field: str) -> Answer:
        """The job's answer.

        Raises:
            InvalidRequest: it takes too long, or the process ended.
            Overloaded: other files take all processes.
        """
        try:
            async with asyncio.timeout(self._limits.open_timeout_s):
                await self._opening.acquire()
        except TimeoutError:
            message = "too many videos and documents at a time"
            raise Overloaded(message, retry_after_s=RETRY_AFTER_S) from None
        try:
            async with _shared(data) as file:
                return await self._run(job, (file.fd,), self._limits.open_timeout_s, field)
        finally:
            self._opening.release()

    async def read(self, job: Job, data: bytes, output: SharedFile, field: str) -> Answer:
        """The same with the job's pixels in `output`; waits as long as it takes until a process is free."""
        async with self._reading, _shared(data) as file:
            return await self._run(job, (file.fd, output.fd), self._limits.decode_timeout_s, field)

    def close(self) -> None:
        """End them; nothing may be running."""
        for process in (*self._idle, *self._busy):
            process.kill()
            process.reap()
        self._idle.clear()
        self._busy.clear()

    async def _run(self, job: Job, fds: tuple[int, ...], timeout_s: float, field: str) -> Answer:
        process = await self._take()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await process.ask(job, fds)
        except BaseException as error:
            self._end(process, _reason(error))
            if isinstance(error, TimeoutError):
                message = f"the file takes longer than {timeout_s:g} s to decode"
                raise InvalidRequest(message, field=field) from None
            if isinstance(error, ProcessEnded):
                raise InvalidRequest("the file made its decoder fail", field=field) from None
            raise
        self._give_back(process)
        return answer

    async def _take(self) -> _Process:
        """One that is ready for a job."""
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                self._busy.add(process)
                return process
            process.kill()
        process = _Process(self._limits.decode_memory_mib)
        self._busy.add(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.started()
        except BaseException as error:
            self._end(process, "start")
            if isinstance(error, TimeoutError | ProcessEnded):
                raise ModelError("the decoder process does not start; see the log") from None
            raise
        return process

    def _give_back(self, process: _Process) -> None:
        self._busy.discard(process)
        if process.num_jobs < MAX_JOBS and len(self._idle) < self._limits.decode_processes:
            self._idle.append(process)
        else:
            self._discard(process)

    def _end(self, process: _Process, reason: str) -> None:
        log.info("decoder process %d ended: %s", process.pid, reason)
        metrics.DECODERS_ENDED.labels(reason).inc()
        self._busy.discard(process)
        self._discard(process)

    def _discard(self, process: _Process) -> None:
        process.kill()
        asyncio.get_running_loop().run_in_executor(None, process.reap)


@asynccontextmanager
async def _shared(data: bytes) -> AsyncIterator[SharedFile]:
    """A copy of a file, there only while a process may read it: files that wait cost no memory twice."""
    file = SharedFile(len(data))
    try:
        await file.fill(data)
        yield file
    finally:
        file.close()


def _reason(error: BaseException) -> str:
    return {TimeoutError: "late", ProcessEnded: "crashed", asyncio.CancelledError: "cancelled"}.get(
        type(error), "bug"
    )


class _Process:
    """Reads jobs from a socket, whose end it takes for the order to end."""

    def __init__(self, memory_mib: int) -> None:
        self.num_jobs = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "encoder_service.decoder_process",
                    str(theirs.fileno()),
                    str(memory_mib),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    async def started(self) -> None:
        """Raises ProcessEnded when it ends instead; its own message is on stderr."""
        if await self._receive() != READY:
            raise ProcessEnded

    async def ask(self, job: Job, fds: tuple[int, ...]) -> Answer:
        """Raises ProcessEnded when there will be no answer."""
        self.num_jobs += 1
        try:
            socket.send_fds(self._socket, [job.to_packet()], list(fds))
            return Answer.from_packet(await self._receive())
        except (OSError, ValueError):
            raise ProcessEnded from None

    async def _receive(self) -> bytes:
        try:
            packet = await asyncio.get_running_loop().sock_recv(self._socket, MAX_PACKET_BYTES)
        except OSError:
            raise ProcessEnded from None
        if not packet:
            raise ProcessEnded
        return packet

    def kill(self) -> None:
        self._child.kill()
        self._socket.close()

    def reap(self) -> None:
        """Return when the kernel has freed what it held."""
        self._child.wait()


class SharedFile:
    """Memory without a name whose size nobody can change, so that reading it cannot end us."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("tessera-media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            self.close()
            raise

    async def fill(self, data: bytes) -> None:
        """In pieces between which other tasks run."""
        view = memoryview(data)
        with self.map() as memory:
            for start in range(0, len(data), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                memory[start : start + len(piece)] = piece
                await asyncio.sleep(0)

    def map(self) -> mmap.mmap:
        """It stays valid when the file is closed."""
        return mmap.mmap(self.fd, self.num_bytes)

    def close(self) -> None:
        os.close(self.fd)
