"""What a bare TCP socket moves between two processes on loopback: the yardstick of the transport benchmark.

`python -m deploy.bench.raw_socket MESSAGE_BYTES`: prints its port, then sends as many messages as each
8-byte request asks for.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from types import TracebackType


def serve(message_bytes: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    payload = memoryview(bytes(message_bytes))
    while request := connection.recv(8):
        for _ in range(int.from_bytes(request, "little")):
            connection.sendall(payload)


class RawSocket:
    """A sender in a process of its own, and our end of the connection."""

    def __init__(self, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        command = [sys.executable, "-m", "deploy.bench.raw_socket", str(message_bytes)]
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

    def bytes_per_second(self, num_messages: int) -> float:
        """Receive `num_messages` into one buffer."""
        buffer = memoryview(bytearray(self._message_bytes))
        start = time.perf_counter()
        self._connection.sendall(num_messages.to_bytes(8, "little"))
        for _ in range(num_messages):
            received = 0
            while received < len(buffer):
                received += self._connection.recv_into(buffer[received:])
        return num_messages * self._message_bytes / (time.perf_counter() - start)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
