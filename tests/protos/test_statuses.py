"""Errors cross a real server as what they were; foreign ones say nothing of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from protos import encoder_pb2
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.errors import (
    MAX_MESSAGE_CHARS,
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.frames import EncodeEvent
from protos.statuses import DOMAIN, carries_our_details, error_from_rpc, error_to_status
from tests.protos.conftest import ScriptedEncoder, running

STATUS_OF = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FingerprintMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    ModelError: grpc.StatusCode.INTERNAL,
}


async def call(error: BaseException) -> grpc.RpcError:
    """What a client of a unary call gets when the handler raises `error`."""

    async def fail() -> encoder_pb2.GetEncoderModelResponse:
        raise error

    async with running(ScriptedEncoder(get_model=fail)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await EncoderStub(channel).GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
            return caught.value


async def stream(error: BaseException, after: int) -> tuple[int, grpc.RpcError]:
    """(events before, error) of a streaming call whose handler raises after some events."""

    async def fail(_: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
        for done in range(after):
            yield encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat(forwards_done=done))
        raise error

    received = 0
    async with running(ScriptedEncoder(encode=fail)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                async for _ in EncoderStub(channel).Encode(iter(()), timeout=5):
                    received += 1
    return received, caught.value


def test_every_class_is_tested_here() -> None:
    def below(error_class: type[ServingError]) -> set[type[ServingError]]:
        ours = [child for child in error_class.__subclasses__() if child.__module__ == "protos.errors"]
        return {error_class}.union(*map(below, ours))

    assert below(ServingError) == {ServingError, *STATUS_OF}


@pytest.mark.parametrize("error_class", STATUS_OF, ids=lambda error_class: error_class.__name__)
async def test_an_error_arrives_as_the_class_it_was(error_class: type[ServingError]) -> None:
    rpc_error = await call(error_class("it went wrong: ü"))
    assert rpc_error.code() is STATUS_OF[error_class]
    arrived = error_from_rpc(rpc_error)
    assert type(arrived) is error_class
    assert (arrived.message, arrived.field, arrived.retry_after_s) == ("it went wrong: ü", None, None)


async def test_field_and_retry_delay_arrive() -> None:
    arrived = error_from_rpc(await call(InvalidRequest("not a picture", field="media[2].data")))
    assert (type(arrived), arrived.field) == (InvalidRequest, "media[2].data")
    arrived = error_from_rpc(await call(Overloaded("queue full", field="priority", retry_after_s=1.25)))
    assert (type(arrived), arrived.field, arrived.retry_after_s) == (Overloaded, "priority", 1.25)


@pytest.mark.parametrize("after", [0, 3])
async def test_a_stream_may_fail_before_and_after_messages(after: int) -> None:
    received, rpc_error = await stream(InvalidRequest("cut short", field="media[0].data"), after)
    assert received == after
    arrived = error_from_rpc(rpc_error)
    assert (type(arrived), arrived.field) == (InvalidRequest, "media[0].data")


async def test_a_foreign_exception_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
    rpc_error = await call(KeyError("/secret/path"))
    assert rpc_error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(rpc_error) and type(error_from_rpc(rpc_error)) is ModelError
    assert "/secret/path" in caplog.text


async def test_a_model_error_is_logged_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        await call(ModelError("NaN in layer 3"))
    (record,) = [record for record in caplog.records if "NaN in layer 3" in record.getMessage()]
    assert record.exc_info is not None


async def test_a_very_long_message_is_cut_and_not_lost() -> None:
    arrived = error_from_rpc(await call(InvalidRequest("x" * 100_000, field="messages[0]")))
    assert (arrived.message, arrived.field) == ("x" * MAX_MESSAGE_CHARS, "messages[0]")


async def test_a_status_without_our_details_becomes_the_class_of_its_code() -> None:
    async with open_channel("127.0.0.1:9") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await EncoderStub(channel).GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
    assert type(error_from_rpc(caught.value)) is Unavailable


async def test_a_code_that_no_class_has_becomes_a_model_error() -> None:
    async with running(ScriptedEncoder()) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            method = channel.unary_unary("/tessera.v1.Encoder/Nothing")
            with pytest.raises(grpc.RpcError) as caught:
                await method(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert type(error_from_rpc(caught.value)) is ModelError


async def test_a_deadline_that_the_client_set_arrives_as_one() -> None:
    async def slow() -> encoder_pb2.GetEncoderModelResponse:
        await asyncio.sleep(30)
        raise AssertionError("the deadline ends this")

    async with running(ScriptedEncoder(get_model=slow)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await EncoderStub(channel).GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=0.1)
    assert type(error_from_rpc(caught.value)) is DeadlineExceeded


def test_the_status_is_what_other_languages_expect() -> None:
    status = error_to_status(Overloaded("queue full", field="n", retry_after_s=0.5))
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for packed, detail in zip(status.details, (info, request, retry), strict=True):
        assert packed.Unpack(detail)
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert (info.reason, info.domain) == ("overloaded", DOMAIN)
    assert [violation.field for violation in request.field_violations] == ["n"]
    assert retry.retry_delay.ToTimedelta().total_seconds() == 0.5


def rpc_error_with(code: grpc.StatusCode, details_bin: bytes) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", details_bin))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, "as told")


DETAILS = error_to_status(Overloaded("as told", retry_after_s=1.0)).SerializeToString()


@pytest.mark.parametrize(
    ("code", "details_bin"),
    [
        (grpc.StatusCode.UNAVAILABLE, DETAILS),
        (grpc.StatusCode.UNAVAILABLE, b"\xff\xff no protobuf"),
        (grpc.StatusCode.UNAVAILABLE, b""),
    ],
    ids=["another code", "garbage", "empty"],
)
def test_details_that_contradict_their_status_leave_the_bare_code(
    code: grpc.StatusCode, details_bin: bytes
) -> None:
    error = rpc_error_with(code, details_bin)
    arrived = error_from_rpc(error)
    assert (type(arrived), arrived.retry_after_s) == (Unavailable, None)
    assert not carries_our_details(error)


def test_a_damaged_detail_is_passed_over() -> None:
    status = error_to_status(Overloaded("as told", retry_after_s=1.0))
    status.details[0].value = b"\xff\xff"
    arrived = error_from_rpc(rpc_error_with(grpc.StatusCode.RESOURCE_EXHAUSTED, status.SerializeToString()))
    assert (type(arrived), arrived.message, arrived.retry_after_s) == (Overloaded, "as told", 1.0)


def test_only_our_own_services_details_are_ours() -> None:
    assert carries_our_details(rpc_error_with(grpc.StatusCode.RESOURCE_EXHAUSTED, DETAILS))
    status = error_to_status(Overloaded("as told"))
    status.details[0].Pack(error_details_pb2.ErrorInfo(reason="overloaded", domain="proxy.example"))
    foreign = rpc_error_with(grpc.StatusCode.RESOURCE_EXHAUSTED, status.SerializeToString())
    assert not carries_our_details(foreign)
