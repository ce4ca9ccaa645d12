"""What a bare TCP socket moves between two processes on loopback: the yardstick of the transport benchmark.

`python -m deploy.bench.raw_socket MESSAGE_BYTES NUM_MESSAGES`: holds so many messages in memory, prints its
port, and sends as many, in turn, as each 8-byte request asks for.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType


def serve(message_bytes: int, num_messages: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    # Not zeros: those would all be the same page of memory.
    payloads = [memoryview(b"\x01" * message_bytes) for _ in range(num_messages)]
    while request := connection.recv(8):
        for number in range(int.from_bytes(request, "little")):
            connection.sendall(payloads[number % num_messages])


class RawSocket:
    """A sender in a process of its own, and our end of the connection."""

    def __init__(self, message_bytes: int, num_messages: int) -> None:
        command = [sys.executable, "-m", "deploy.bench.raw_socket", str(message_bytes), str(num_messages)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._connection = socket.create_connection(("127.0.0.1", port))

    @property
    def pid(self) -> int:
        """Of the sender."""
        return self._process.pid

    def __enter__(self) -> RawSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.wait(10)

    def bytes_per_second(self, num_messages: int, buffers: Sequence[memoryview]) -> float:
        """Receive `num_messages` into the buffers in turn, each of a message's size."""
        start = time.perf_counter()
        self._connection.sendall(num_messages.to_bytes(8, "little"))
        num_bytes = 0
        for number in range(num_messages):
            buffer = buffers[number % len(buffers)]
            received = 0
            while received < len(buffer):
                received += self._connection.recv_into(buffer[received:])
            num_bytes += received
        return num_bytes / (time.perf_counter() - start)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
