"""The yardstick moves what it says."""

from __future__ import annotations

from deploy.bench.raw_socket import RawSocket


def test_all_that_was_asked_for_arrives() -> None:
    with RawSocket(1 << 16, 2) as raw:
        buffers = [memoryview(bytearray(1 << 16)) for _ in range(2)]
        assert raw.bytes_per_second(3, buffers) > 0 and raw.bytes_per_second(5, buffers) > 0
        assert all(bytes(buffer) == b"\x01" * (1 << 16) for buffer in buffers)
