"""Calls are counted with the code that the client saw, streams included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from prometheus_client import REGISTRY

from protos import encoder_pb2
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.errors import InvalidRequest
from protos.frames import EncodeEvent
from tests.protos.conftest import ScriptedEncoder, running

GET_MODEL = encoder_pb2.GetEncoderModelRequest()
HEARTBEAT = encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat())


def value(name: str, method: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"method": f"/tessera.v1.Encoder/{method}", **labels}) or 0.0


def handled(method: str, code: str) -> float:
    return value("tessera_grpc_handled_total", method, code=code)


async def test_a_unary_call_is_counted_and_timed() -> None:
    before = handled("GetModel", "OK"), value("tessera_grpc_seconds_count", "GetModel")
    async with running(ScriptedEncoder()) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)
    assert (handled("GetModel", "OK"), value("tessera_grpc_seconds_count", "GetModel")) == (
        before[0] + 1,
        before[1] + 1,
    )


async def test_a_refused_call_is_counted_with_its_code() -> None:
    async def refuse() -> encoder_pb2.GetEncoderModelResponse:
        raise InvalidRequest("no")

    before = handled("GetModel", "INVALID_ARGUMENT")
    encoder = ScriptedEncoder(get_model=refuse)
    async with running(encoder) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.RpcError):
            await EncoderStub(channel).GetModel(GET_MODEL, timeout=5)
    assert handled("GetModel", "INVALID_ARGUMENT") == before + 1


async def test_a_stream_is_in_flight_until_it_ends() -> None:
    gate = asyncio.Event()

    async def encode(_: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        yield HEARTBEAT
        await gate.wait()

    before = handled("Encode", "OK")
    encoder = ScriptedEncoder(encode=encode)
    async with running(encoder) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        call = EncoderStub(channel).Encode(iter(()), timeout=5)
        await call.read()
        assert value("tessera_grpc_in_flight", "Encode") == 1
        gate.set()
        assert await call.read() is grpc.aio.EOF
    assert value("tessera_grpc_in_flight", "Encode") == 0
    assert handled("Encode", "OK") == before + 1


async def test_a_cancelled_stream_runs_its_cleanup_and_is_counted_as_cancelled() -> None:
    cleaned = asyncio.Event()

    async def encode(_: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        try:
            while True:
                yield HEARTBEAT
                await asyncio.sleep(0.01)
        finally:
            cleaned.set()

    before = handled("Encode", "CANCELLED")
    encoder = ScriptedEncoder(encode=encode)
    async with running(encoder) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        call = EncoderStub(channel).Encode(iter(()), timeout=5)
        await call.read()
        call.cancel()
        await asyncio.wait_for(cleaned.wait(), 2)
    assert handled("Encode", "CANCELLED") == before + 1
    assert value("tessera_grpc_in_flight", "Encode") == 0


async def test_health_checks_are_not_counted() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with running(ScriptedEncoder()) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    methods = {
        sample.labels["method"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "tessera_grpc_started_total"
    }
    assert not [method for method in methods if method.startswith("/grpc.")]
