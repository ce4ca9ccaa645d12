"""Limits that both ends share, as a real connection keeps them."""

from __future__ import annotations

import grpc
import pytest

from protos import encoder_pb2
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.options import (
    KEEPALIVE_TIME_MS,
    KEEPALIVE_TIMEOUT_MS,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MIN_PING_INTERVAL_MS,
    SHARED_OPTIONS,
)
from tests.protos.conftest import ScriptedEncoder, running

GET_MODEL = encoder_pb2.GetEncoderModelRequest()


@pytest.mark.parametrize(("num_bytes", "fits"), [(-1024, True), (1024, False)])
async def test_metadata_passes_up_to_the_limit_and_never_by_chance(num_bytes: int, fits: bool) -> None:
    """Between gRPC's own soft and hard limit the same call would sometimes pass."""
    metadata = (("padding", "x" * (MAX_METADATA_BYTES + num_bytes)),)
    passed = 0
    async with running(ScriptedEncoder()) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        for _ in range(10):
            try:
                await EncoderStub(channel).GetModel(GET_MODEL, metadata=metadata, timeout=5)
                passed += 1
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert passed == (10 if fits else 0)


def test_a_server_allows_the_pings_that_clients_send() -> None:
    assert MIN_PING_INTERVAL_MS + KEEPALIVE_TIMEOUT_MS < KEEPALIVE_TIME_MS


def test_a_chunk_and_the_largest_tile_fit_into_a_message() -> None:
    assert max(MAX_CHUNK_BYTES, 256 * 8192 * 4) + 1024 < MAX_MESSAGE_BYTES


def test_no_option_is_given_twice() -> None:
    names = [name for name, _ in SHARED_OPTIONS]
    assert len(names) == len(set(names))
