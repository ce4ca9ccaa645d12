"""The one table between our errors and gRPC statuses, and both directions through it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.errors import (
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

DOMAIN = "tessera"

# The first class of a status stands for it where it comes without a reason of ours.
STATUSES: dict[type[ServingError], grpc.StatusCode] = {
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
_DETAILS = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
ERROR_OF_REASON = {error_class.reason: error_class for error_class in STATUSES}
_BY_STATUS = {status: error_class for error_class, status in reversed(STATUSES.items())}

_WRITE_FAILED = "Internal error from Core"

log = logging.getLogger(__name__)


def error_to_status(error: ServingError) -> status_pb2.Status:
    """`google.rpc.Status` with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration(
            seconds=int(error.retry_after_s), nanos=int(error.retry_after_s % 1 * 1e9)
        )
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    code = getattr(code_pb2, _status_of(error).name)
    return status_pb2.Status(code=code, message=error.message, details=packed)


def error_from_rpc(rpc_error: grpc.RpcError) -> ServingError:
    """The error that the other side raised; foreign statuses become the class of their code."""
    code = rpc_error.code()
    info = error_details_pb2.ErrorInfo()
    field: str | None = None
    retry_after_s: float | None = None
    for detail in _details_of(rpc_error):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            info = detail
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        elif detail.field_violations:
            field = detail.field_violations[0].field
    error_class = Unavailable if write_failed(rpc_error) else _BY_STATUS.get(code, ModelError)
    if info.domain == DOMAIN:
        error_class = ERROR_OF_REASON.get(info.reason, error_class)
    message = rpc_error.details() or code.name
    return error_class(message, field=field, retry_after_s=retry_after_s)


def carries_our_details(rpc_error: grpc.RpcError) -> bool:
    """Whether a service of ours wrote the status; the text of any other is not for clients."""
    return any(
        isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == DOMAIN
        for detail in _details_of(rpc_error)
    )


def write_failed(rpc_error: grpc.RpcError) -> bool:
    """Whether the connection broke under a write: grpc.aio then calls it INTERNAL (grpc#36066)."""
    return rpc_error.details() == _WRITE_FAILED


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: ServingError) -> NoReturn:
    """End the call with the status of `error`; never returns."""
    status = rpc_status.to_status(error_to_status(error))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")


@asynccontextmanager
async def rpc_errors(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Turn exceptions of a handler into statuses, in streaming handlers also after messages were sent.

    Text of foreign exceptions stays in the log: it may name files or addresses.
    """
    try:
        yield
    except ServingError as error:
        if isinstance(error, ModelError):
            log.error("request failed: %s", error.message, exc_info=error)
        await abort_with(context, error)
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception:
        log.exception("unexpected error in a handler")
        await abort_with(context, ModelError("internal error; see the server's log"))


def _details_of(rpc_error: grpc.RpcError) -> Iterator[Any]:
    """ErrorInfo, BadRequest and RetryInfo of a status; nothing of one that contradicts itself."""
    try:
        status = rpc_status.from_call(rpc_error)
    except (ValueError, DecodeError):  # a proxy has changed the code, or the details are no protobuf
        return
    for packed in status.details if status is not None else ():
        for kind in _DETAILS:
            detail = kind()
            with suppress(DecodeError):
                if packed.Unpack(detail):
                    yield detail


def _status_of(error: ServingError) -> grpc.StatusCode:
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
