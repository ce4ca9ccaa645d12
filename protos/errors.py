"""The errors a client or operator can cause, and the one table between them and gRPC statuses.

ServingError
  InvalidRequest         INVALID_ARGUMENT     a field is wrong; carries google.rpc.BadRequest
    ContextLengthExceeded  INVALID_ARGUMENT   prompt longer than the context
  NotFound               NOT_FOUND            no such model
  Overloaded             RESOURCE_EXHAUSTED   queue full; carries google.rpc.RetryInfo
  FingerprintMismatch    FAILED_PRECONDITION  the two halves come from different checkpoints
  Unavailable            UNAVAILABLE          the service behind is down or draining; retryable
  DeadlineExceeded       DEADLINE_EXCEEDED
  Cancelled              CANCELLED            the caller went away
  ModelError             INTERNAL             a bug; details stay in the log
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "tessera"
# Trailers share gRPC's metadata budget (8 KiB soft limit), so messages are cut well below it.
MAX_MESSAGE_CHARS = 1024

log = logging.getLogger(__name__)


class ServingError(Exception):
    """An error with a status, a machine-readable reason and, if known, the request field at fault."""

    code = grpc.StatusCode.INTERNAL
    reason = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message[:MAX_MESSAGE_CHARS]
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(ServingError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    reason = "context_length_exceeded"


class NotFound(ServingError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "not_found"


class Overloaded(ServingError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "overloaded"


class FingerprintMismatch(ServingError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "fingerprint_mismatch"


class Unavailable(ServingError):
    code = grpc.StatusCode.UNAVAILABLE
    reason = "unavailable"


class DeadlineExceeded(ServingError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline_exceeded"


class Cancelled(ServingError):
    code = grpc.StatusCode.CANCELLED
    reason = "cancelled"


class ModelError(ServingError):
    pass


_CLASSES: tuple[type[ServingError], ...] = (
    InvalidRequest,
    ContextLengthExceeded,
    NotFound,
    Overloaded,
    FingerprintMismatch,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    ModelError,
)
_BY_REASON = {error_class.reason: error_class for error_class in _CLASSES}
# The first class listed for a code stands for statuses that carry no reason of ours.
_BY_CODE = {error_class.code: error_class for error_class in reversed(_CLASSES)}


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
    code = getattr(code_pb2, error.code.name)
    return status_pb2.Status(code=code, message=error.message, details=packed)


def error_from_rpc(rpc_error: grpc.RpcError) -> ServingError:
    """The error that the other side raised; foreign statuses become the class of their code."""
    code = rpc_error.code()
    status = rpc_status.from_call(rpc_error)
    info = error_details_pb2.ErrorInfo()
    field: str | None = None
    retry_after_s: float | None = None
    for detail in status.details if status is not None else ():
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        else:
            detail.Unpack(info)
    error_class = _BY_CODE.get(code, ModelError)
    if info.domain == DOMAIN:
        error_class = _BY_REASON.get(info.reason, error_class)
    message = rpc_error.details() or code.name
    return error_class(message, field=field, retry_after_s=retry_after_s)


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
