"""Request ids and trace context pass through; what is unsafe to log does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from protos import encoder_pb2
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.request_context import REQUEST_ID_KEY, accept_request_id, outgoing_metadata, request_id_of
from tests.protos.conftest import ScriptedEncoder, running


@pytest.mark.parametrize("candidate", ["a", "req-1", "A.b:c_d-9", "x" * 128])
def test_a_safe_id_is_kept(candidate: str) -> None:
    assert accept_request_id(candidate) == candidate


@pytest.mark.parametrize(
    "candidate", [None, "", "x" * 129, "two words", "new\nline", "ünsafe", "a/b", "trailing\n"]
)
def test_any_other_id_is_replaced_by_a_new_one(candidate: str | None) -> None:
    first, second = accept_request_id(candidate), accept_request_id(candidate)
    assert first != candidate and first != second and len(first) == 32


def test_only_trace_context_is_passed_on() -> None:
    incoming = (("traceparent", "00-1-2-01"), ("authorization", "secret"), ("tracestate", "a=b"))
    expected = ((REQUEST_ID_KEY, "r1"), ("traceparent", "00-1-2-01"), ("tracestate", "a=b"))
    assert outgoing_metadata("r1", incoming) == expected
    assert outgoing_metadata("r1") == ((REQUEST_ID_KEY, "r1"),)


@dataclass
class Remembering(ScriptedEncoder):
    """Keeps the ids that it finds in each call."""

    ids: list[str] = field(default_factory=list)

    async def GetModel(
        self, request: encoder_pb2.GetEncoderModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> encoder_pb2.GetEncoderModelResponse:
        self.ids += [request_id_of(context), request_id_of(context, "in-message")]
        return await super().GetModel(request, context)


@pytest.mark.parametrize("sent", ["req-7", "not valid!"])
async def test_a_service_finds_the_id_in_message_or_metadata(sent: str) -> None:
    encoder = Remembering()
    async with running(encoder) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        await EncoderStub(channel).GetModel(
            encoder_pb2.GetEncoderModelRequest(), metadata=outgoing_metadata(sent), timeout=5
        )
    from_metadata, from_message = encoder.ids
    assert from_message == "in-message"
    assert (from_metadata == sent) == (sent == "req-7") and from_metadata
