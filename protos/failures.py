"""Errors of single requests on a stream that many share; `protos.statuses` is for calls of their own."""

from __future__ import annotations

from protos import language_model_pb2
from protos.errors import ModelError, ServingError
from protos.statuses import ERROR_OF_REASON


def error_to_failure(error: ServingError) -> language_model_pb2.Failure:
    return language_model_pb2.Failure(
        reason=error.reason, message=error.message, field=error.field, retry_after_s=error.retry_after_s
    )


def error_from_failure(failure: language_model_pb2.Failure) -> ServingError:
    """The error that the service raised; a reason that is not ours is a ModelError."""
    error_class = ERROR_OF_REASON.get(failure.reason, ModelError)
    retry_after_s = failure.retry_after_s if failure.HasField("retry_after_s") else None
    return error_class(failure.message, field=failure.field or None, retry_after_s=retry_after_s)
