"""The status with which a server ended an Encode call, whatever gRPC makes of it afterwards."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import grpc

from protos.encoder_rpc import EncodeCall

T = TypeVar("T")


class CallEnding:
    """How the server ended a call.  Apart from the stream, which a cycle through the call would keep.

    gRPC overwrites the server's status with INTERNAL when a write of ours fails behind it: the rule, not the
    exception, while a picture is uploaded.  https://github.com/grpc/grpc/issues/36066
    """

    def __init__(self) -> None:
        self.error: grpc.aio.AioRpcError | None = None

    def note(self, call: EncodeCall) -> None:
        if self.error is None:
            code, details = _result(call.code()), _result(call.details())
            trailers = _result(call.trailing_metadata())
            self.error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    """Of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise AssertionError("the call has not ended")
