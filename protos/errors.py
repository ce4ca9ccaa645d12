"""The errors a client or operator can cause; `protos.statuses` carries them over the wire.

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

# Trailers share gRPC's metadata budget (8 KiB soft limit), so messages are cut well below it.
MAX_MESSAGE_CHARS = 1024


class ServingError(Exception):
    """An error with a machine-readable reason and, if known, the request field at fault."""

    reason = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message[:MAX_MESSAGE_CHARS]
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(ServingError):
    reason = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    reason = "context_length_exceeded"


class NotFound(ServingError):
    reason = "not_found"


class Overloaded(ServingError):
    reason = "overloaded"


class FingerprintMismatch(ServingError):
    reason = "fingerprint_mismatch"


class Unavailable(ServingError):
    reason = "unavailable"


class DeadlineExceeded(ServingError):
    reason = "deadline_exceeded"


class Cancelled(ServingError):
    reason = "cancelled"


class ModelError(ServingError):
    pass
