"""A channel finds a restarted server again by itself, and soon."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from protos import encoder_pb2
from protos.channel import MAX_RECONNECT_BACKOFF_MS, ClientTlsConfig, is_serving, open_channel
from protos.encoder_rpc import SERVICE_NAME, EncoderStub
from protos.server import ServerConfig
from tests.protos.conftest import Certificates, ScriptedEncoder, running

GET_MODEL = encoder_pb2.GetEncoderModelRequest()


async def test_it_reconnects_within_the_backoff_after_a_restart_on_the_same_port() -> None:
    async with running(ScriptedEncoder()) as server:
        port = server.port
        channel = open_channel(f"127.0.0.1:{port}")
        stub = EncoderStub(channel)
        await stub.GetModel(GET_MODEL, timeout=5)
    with pytest.raises(grpc.RpcError) as caught:
        await stub.GetModel(GET_MODEL, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.sleep(3)  # long enough for gRPC's default backoff to have grown beyond ours
    async with running(ScriptedEncoder(), ServerConfig(port=port, shutdown_grace_s=0)), channel:
        start = time.monotonic()
        await stub.GetModel(GET_MODEL, timeout=10, wait_for_ready=True)
        # gRPC adds up to 20 % of jitter to the backoff.
        assert time.monotonic() - start < 1.2 * MAX_RECONNECT_BACKOFF_MS / 1000 + 0.5


async def test_a_server_that_is_not_there_fails_fast() -> None:
    async with open_channel("127.0.0.1:9") as channel:
        start = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            await EncoderStub(channel).GetModel(GET_MODEL, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - start < 2


async def test_every_channel_has_a_connection_of_its_own() -> None:
    peers = set()

    class Watching(ScriptedEncoder):
        async def GetModel(self, request, context):  # type: ignore[no-untyped-def]
            peers.add(context.peer())
            return await super().GetModel(request, context)

    async with running(Watching()) as server:
        for _ in range(2):
            async with open_channel(f"127.0.0.1:{server.port}") as first:
                async with open_channel(f"127.0.0.1:{server.port}") as second:
                    await EncoderStub(first).GetModel(GET_MODEL, timeout=5)
                    await EncoderStub(second).GetModel(GET_MODEL, timeout=5)
    assert len(peers) == 4


async def test_a_name_is_resolved() -> None:
    async with running(ScriptedEncoder()) as server:
        async with open_channel(f"dns:///localhost:{server.port}") as channel:
            answer = await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)
    assert answer.model == "scripted"


@pytest.mark.parametrize("server_name", ["encoders.internal", "another.internal"])
async def test_an_address_behind_a_name_shows_the_certificate_of_the_name(
    certificates: Certificates, server_name: str
) -> None:
    config = ServerConfig(
        tls_cert=certificates.named, tls_key=certificates.named_key, shutdown_grace_s=0, reflection=False
    )
    async with running(ScriptedEncoder(), config) as server:
        tls = ClientTlsConfig(ca=certificates.ca)
        async with open_channel(f"127.0.0.1:{server.port}", tls, server_name) as channel:
            if server_name == "encoders.internal":
                assert (await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)).model == "scripted"
                assert await is_serving(channel, SERVICE_NAME, 5)
            else:
                with pytest.raises(grpc.RpcError):
                    await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)


async def test_health_is_what_the_server_says() -> None:
    async with running(ScriptedEncoder()) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            assert await is_serving(channel, SERVICE_NAME, 5)
            await server.set_serving(False)
            assert not await is_serving(channel, SERVICE_NAME, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"cert": "c"}, "both cert and key"), ({"key": "k"}, "both"), ({"cert": "c", "key": "k"}, "needs ca")],
)
def test_half_a_client_certificate_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientTlsConfig(**values)
