"""A server's conduct: health, reflection, drain, addresses, TLS, limits, metrics."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import encoder_pb2
from protos.channel import ClientTlsConfig, open_channel
from protos.encoder_rpc import SERVICE_NAME, EncoderStub, add_encoder_servicer
from protos.frames import EncodeEvent
from protos.options import MAX_MESSAGE_BYTES
from protos.server import Server, ServerConfig
from tests.protos.conftest import Certificates, ScriptedEncoder, running

GET_MODEL = encoder_pb2.GetEncoderModelRequest()


async def health_of(port: int, service: str) -> str:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


async def test_the_process_is_alive_before_its_service_is_ready() -> None:
    server = Server(ServerConfig(shutdown_grace_s=0), [SERVICE_NAME])
    port = await server.start()
    try:
        assert (await health_of(port, ""), await health_of(port, SERVICE_NAME)) == ("SERVING", "NOT_SERVING")
        await server.set_serving()
        assert await health_of(port, SERVICE_NAME) == "SERVING"
        await server.set_serving(False)
        assert await health_of(port, SERVICE_NAME) == "NOT_SERVING"
    finally:
        await server.stop()


async def test_health_of_a_service_that_is_not_here_is_not_found() -> None:
    async with running(ScriptedEncoder()) as server:
        with pytest.raises(grpc.RpcError) as caught:
            await health_of(server.port, "tessera.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def list_services(port: int) -> list[str]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="*")
        responses = [answer async for answer in stub.ServerReflectionInfo(iter([request]), timeout=5)]
    return sorted(service.name for service in responses[0].list_services_response.service)


async def test_reflection_lists_the_services() -> None:
    async with running(ScriptedEncoder()) as server:
        names = await list_services(server.port)
    assert names == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", SERVICE_NAME]


async def test_reflection_can_be_switched_off() -> None:
    async with running(ScriptedEncoder(), ServerConfig(shutdown_grace_s=0, reflection=False)) as server:
        with pytest.raises(grpc.RpcError) as caught:
            await list_services(server.port)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_stopping_lets_a_running_stream_finish_and_refuses_new_calls() -> None:
    gate = asyncio.Event()

    async def encode(_: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        yield encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat())
        await gate.wait()
        yield encoder_pb2.EncodeResponse(done=encoder_pb2.Done())

    async with running(ScriptedEncoder(encode=encode), ServerConfig(shutdown_grace_s=10)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            call = EncoderStub(channel).Encode(iter(()), timeout=10)
            await call.read()
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.1)
            async with open_channel(f"127.0.0.1:{server.port}") as late:
                with pytest.raises(grpc.RpcError) as caught:
                    await EncoderStub(late).GetModel(GET_MODEL, timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            gate.set()
            assert (await call.read()).WhichOneof("event") == "done"
            assert await call.read() is grpc.aio.EOF
            await asyncio.wait_for(stopping, 5)


async def test_stopping_ends_a_stream_that_outlasts_the_grace_period() -> None:
    async def encode(_: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        yield encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat())
        await asyncio.sleep(60)

    async with running(ScriptedEncoder(encode=encode), ServerConfig(shutdown_grace_s=0.2)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            call = EncoderStub(channel).Encode(iter(()), timeout=30)
            await call.read()
            await asyncio.wait_for(server.stop(), 5)
            with pytest.raises((grpc.RpcError, asyncio.CancelledError)):
                await call.read()


async def test_a_port_that_is_taken_is_an_os_error_naming_it() -> None:
    async with running(ScriptedEncoder()) as first:
        second = Server(ServerConfig(port=first.port, shutdown_grace_s=0), [SERVICE_NAME])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{first.port}"):
            await second.start()


async def test_an_address_of_another_machine_is_an_os_error() -> None:
    server = Server(ServerConfig(host="192.0.2.1", shutdown_grace_s=0), [SERVICE_NAME])
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1"):
        await server.start()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, "port must be 0..65535, got 65536"),
        ({"metrics_port": -2}, "metrics_port must be -1..65535, got -2"),
        ({"tls_key": "k"}, "tls_cert and tls_key"),
        ({"tls_client_ca": "ca"}, "tls_client_ca needs tls_cert"),
        ({"shutdown_grace_s": -1.0}, "shutdown_grace_s must be >= 0, got -1.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**values)  # type: ignore[arg-type]


async def model_over_tls(config: ServerConfig, tls: ClientTlsConfig | None) -> str:
    async with running(ScriptedEncoder(), config) as server:
        async with open_channel(f"127.0.0.1:{server.port}", tls) as channel:
            return (await EncoderStub(channel).GetModel(GET_MODEL, timeout=3)).model


async def test_tls(certificates: Certificates) -> None:
    config = ServerConfig(shutdown_grace_s=0, tls_cert=certificates.server, tls_key=certificates.server_key)
    assert await model_over_tls(config, ClientTlsConfig(ca=certificates.ca)) == "scripted"
    for wrong in (None, ClientTlsConfig(ca=certificates.other_ca)):
        with pytest.raises(grpc.RpcError):
            await model_over_tls(config, wrong)


async def test_mutual_tls(certificates: Certificates) -> None:
    config = ServerConfig(
        shutdown_grace_s=0,
        tls_cert=certificates.server,
        tls_key=certificates.server_key,
        tls_client_ca=certificates.ca,
    )
    ours = ClientTlsConfig(certificates.ca, certificates.client, certificates.client_key)
    assert await model_over_tls(config, ours) == "scripted"
    theirs = ClientTlsConfig(certificates.ca, certificates.other_client, certificates.other_client_key)
    for wrong in (ClientTlsConfig(ca=certificates.ca), theirs):
        with pytest.raises(grpc.RpcError):
            await model_over_tls(config, wrong)


@pytest.mark.parametrize(
    ("num_bytes", "fits"), [(MAX_MESSAGE_BYTES - 64, True), (MAX_MESSAGE_BYTES + 1, False)]
)
async def test_a_message_may_be_as_large_as_the_limit_and_no_larger(num_bytes: int, fits: bool) -> None:
    received = []

    async def encode(requests: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        async for request in requests:
            received.append(len(request.chunk.data))
        yield encoder_pb2.EncodeResponse(done=encoder_pb2.Done())

    chunk = encoder_pb2.EncodeRequest(chunk=encoder_pb2.MediaChunk(data=bytes(num_bytes)))
    async with running(ScriptedEncoder(encode=encode)) as server:
        # A foreign client without a limit of its own: the server must be the one that refuses.
        unlimited = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=unlimited) as channel:
            call = EncoderStub(channel).Encode(iter([chunk]), timeout=20)
            if fits:
                assert [event async for event in call] and received == [num_bytes]
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    [event async for event in call]
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not received


async def test_the_metrics_page_counts_calls() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with running(ScriptedEncoder(), ServerConfig(shutdown_grace_s=0, metrics_port=port)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        )
    assert 'tessera_grpc_started_total{method="/tessera.v1.Encoder/GetModel"}' in page


SERVE = """
import asyncio
from protos.server import Server, ServerConfig, shutdown_signal
async def main():
    server = Server(ServerConfig(shutdown_grace_s=1), ["tessera.v1.Encoder"])
    port = await server.start()
    stopping = shutdown_signal()
    print(port, flush=True)
    await stopping.wait()
    print("asked to stop", flush=True)
    await server.stop()
    print("stopped", flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_the_process_cleanly(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and int(process.stdout.readline()) > 0
        process.send_signal(number)
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output.split("\n")) == (0, ["asked to stop", "stopped", ""])


def test_the_generated_servicer_can_be_replaced_by_ours() -> None:
    """Both register the same two methods."""
    methods = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].methods
    registered: list[grpc.GenericRpcHandler] = []

    class Recorder:
        def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
            registered.extend(handlers)

    add_encoder_servicer(ScriptedEncoder(), Recorder())  # type: ignore[arg-type]
    (handler,) = registered
    for method in methods:
        details = type("Details", (), {"method": f"/{SERVICE_NAME}/{method.name}", "invocation_metadata": ()})
        found = handler.service(details)  # type: ignore[arg-type]
        assert found is not None
        assert found.response_streaming == method.server_streaming
        assert found.request_streaming == method.client_streaming
