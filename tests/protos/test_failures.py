"""Errors survive the way through a Failure."""

from __future__ import annotations

import pytest

from protos import language_model_pb2 as pb
from protos.errors import InvalidRequest, ModelError, Overloaded, ServingError
from protos.failures import error_from_failure, error_to_failure
from protos.statuses import STATUSES


@pytest.mark.parametrize("kind", STATUSES)
def test_class_message_field_and_wait_arrive(kind: type[ServingError]) -> None:
    sent = error_to_failure(kind("why", field="a.b", retry_after_s=2.5)).SerializeToString()
    error = error_from_failure(pb.Failure.FromString(sent))
    assert type(error) is kind
    assert (error.message, error.field, error.retry_after_s) == ("why", "a.b", 2.5)


def test_what_was_not_said_is_none() -> None:
    error = error_from_failure(error_to_failure(InvalidRequest("why")))
    assert error.field is None and error.retry_after_s is None
    assert error_from_failure(error_to_failure(Overloaded("x", retry_after_s=0.0))).retry_after_s == 0


def test_an_unknown_reason_is_a_model_error() -> None:
    assert type(error_from_failure(pb.Failure(reason="of tomorrow", message="x"))) is ModelError
