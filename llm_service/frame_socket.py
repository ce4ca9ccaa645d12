"""Length-prefixed msgpack frames over a non-blocking stream socket, for the engine's select loop."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
READ_BYTES = 1 << 20


class FrameDecoder:
    """Cuts a byte stream into messages of one type."""

    def __init__(self, message_type: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the messages that `data` completes.

        Raises:
            msgspec.DecodeError, ValueError: the peer does not speak the protocol.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            message = self._decoder.decode(memoryview(self._buffer)[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield message


def encode_frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "little") + payload


class FrameSocket:
    """One connection.  `send` never blocks: what the peer does not take is kept until `flush`."""

    def __init__(self, connection: socket.socket, message_type: Any) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._decoder = FrameDecoder(message_type)
        self._unsent: deque[memoryview] = deque()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[Any]:
        """Messages that have arrived.

        Raises:
            ConnectionError: the peer is gone or does not speak the protocol.
        """
        messages: list[Any] = []
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except BlockingIOError:
                return messages
            if not data:
                raise ConnectionResetError("peer closed the connection")
            try:
                messages.extend(self._decoder.feed(data))
            except (msgspec.DecodeError, ValueError) as error:
                raise ConnectionAbortedError("malformed frame") from error

    def send(self, message: msgspec.Struct) -> None:
        """Raises ConnectionError when the peer is gone."""
        self._unsent.append(memoryview(encode_frame(message)))
        self.flush()

    def flush(self) -> bool:
        """True when everything has left; raises ConnectionError when the peer is gone."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent[0])
            except BlockingIOError:
                return False
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()
        return True

    def close(self) -> None:
        self._socket.close()
