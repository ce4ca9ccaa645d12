"""The yardstick moves what it says."""

from __future__ import annotations

from deploy.bench.raw_socket import RawSocket


def test_all_that_was_asked_for_arrives() -> None:
    with RawSocket(1 << 16) as raw:
        assert raw.bytes_per_second(3) > 0 and raw.bytes_per_second(5) > 0
