"""A tower that hangs takes its service out of use, and brings it back when it goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from encoder_service.process import watch_tower
from protos import encoder_pb2
from protos.channel import is_serving
from protos.encoder_rpc import SERVICE_NAME, EncodeCall
from protos.errors import ServingError, Unavailable
from protos.statuses import error_from_rpc
from tests.checkpoints import make_checkpoint
from tests.encoder_service.wire import (
    SIDE,
    Answer,
    ScriptedVision,
    Service,
    finish,
    gradient,
    read_layout,
    serving,
    start,
    until,
)

LIMIT_S = 1.2  # three ticks of the watch


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "qwen2", "chat", image_size=SIDE)


async def until_serving(service: Service, serves: bool) -> None:
    async with asyncio.timeout(30):
        while await is_serving(service.channel, SERVICE_NAME, 5) is not serves:
            await asyncio.sleep(0.01)


async def end_of(call: EncodeCall) -> ServingError:
    with pytest.raises(grpc.RpcError) as caught:
        await Answer().read_all(call)
    return error_from_rpc(caught.value)


async def refusal_of_get_model(service: Service) -> ServingError:
    with pytest.raises(grpc.RpcError) as caught:
        await service.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
    return error_from_rpc(caught.value)


async def test_while_the_tower_hangs_streams_end_and_new_calls_are_refused(checkpoint: Path) -> None:
    vision = ScriptedVision()
    async with serving(checkpoint, vision) as service:
        await service.server.set_serving()
        watching = asyncio.create_task(watch_tower(LIMIT_S, service.servicer, service.server))
        vision.gate.clear()
        hit = [await start(service, [gradient(seed)], initial_credit=20) for seed in range(2)]
        for call in hit:
            await read_layout(call)
        await until_serving(service, False)
        new = await start(service, [gradient()])
        errors = [await end_of(call) for call in (*hit, new)]
        errors.append(await refusal_of_get_model(service))
        for error in errors:
            assert type(error) is Unavailable and error.retry_after_s
            assert error.message == "the encoder makes no progress"
        assert vision.batches == [vision.batches[0]]
        vision.gate.set()
        await until_serving(service, True)
        call = await start(service, [gradient()], initial_credit=13)
        await read_layout(call)
        assert len((await finish(call)).tiles) == 13
        watching.cancel()
        await asyncio.wait([watching])


async def test_the_tower_has_work_only_while_there_are_tiles(checkpoint: Path) -> None:
    vision = ScriptedVision()
    async with serving(checkpoint, vision) as service:
        assert not service.servicer.is_computing
        vision.gate.clear()
        call = await start(service, [gradient()], initial_credit=13)
        await read_layout(call)
        await until(lambda: service.servicer.is_computing)
        vision.gate.set()
        await finish(call)
        await until(lambda: not service.servicer.is_computing)
        assert service.servicer.forwards_done == len(vision.batches)
