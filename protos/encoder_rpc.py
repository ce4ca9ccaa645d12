"""Encoder's methods bound to the copy-saving serialisers instead of the generated ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from protos import encoder_pb2, encoder_pb2_grpc
from protos.frames import EncodeEvent, deserialize_event, serialize_event

SERVICE_NAME = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name

EncodeCall = grpc.aio.StreamStreamCall[encoder_pb2.EncodeRequest, EncodeEvent]


class EncoderServicer(Protocol):
    def Encode(
        self,
        requests: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[EncodeEvent]: ...

    async def Attach(
        self,
        request: encoder_pb2.AttachRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> encoder_pb2.AttachResponse: ...

    async def GetModel(
        self,
        request: encoder_pb2.GetEncoderModelRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> encoder_pb2.GetEncoderModelResponse: ...


def add_encoder_servicer(servicer: EncoderServicer, server: grpc.aio.Server) -> None:
    """Like the generated `add_EncoderServicer_to_server`, but tiles leave with one copy."""
    handlers: dict[str, Any] = {
        "Encode": grpc.stream_stream_rpc_method_handler(
            servicer.Encode,
            request_deserializer=encoder_pb2.EncodeRequest.FromString,
            response_serializer=serialize_event,
        ),
        "Attach": grpc.unary_unary_rpc_method_handler(
            servicer.Attach,
            request_deserializer=encoder_pb2.AttachRequest.FromString,
            response_serializer=encoder_pb2.AttachResponse.SerializeToString,
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            servicer.GetModel,
            request_deserializer=encoder_pb2.GetEncoderModelRequest.FromString,
            response_serializer=encoder_pb2.GetEncoderModelResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


class EncoderStub(encoder_pb2_grpc.EncoderStub):
    """Like the generated stub, but tiles arrive as views into the received bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self.Encode = channel.stream_stream(
            f"/{SERVICE_NAME}/Encode",
            request_serializer=encoder_pb2.EncodeRequest.SerializeToString,
            response_deserializer=deserialize_event,
        )
