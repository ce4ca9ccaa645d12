"""The table from errors to HTTP, headers included, and what becomes of a body that nobody reads."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from starlette.responses import JSONResponse
from starlette.types import Message

from gateway.errors import (
    INTERNAL_MESSAGE,
    LINGER_BYTES,
    LINGER_S,
    MAX_RETRY_AFTER_S,
    ClientDisconnected,
    ModelNotFound,
    RequestError,
    error_body,
    error_response,
    form_of,
)
from protos.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)

TOO_LARGE = RequestError("too large", code="request_too_large", status=413)


def test_a_class_without_a_form_of_its_own_has_that_of_its_nearest_ancestor() -> None:
    class StillTooLong(ContextLengthExceeded):
        pass

    class Unheard(ServingError):
        pass

    assert form_of(StillTooLong("x")).code == "context_length_exceeded"
    assert form_of(ClientDisconnected()).status == 499
    assert form_of(Unheard("x")) == form_of(ModelError("x"))


def test_what_the_gateway_found_has_its_own_status_and_code() -> None:
    error = RequestError("no", code="unsupported_media_type", param="a.b", status=415)
    assert (form_of(error).status, form_of(error).type) == (415, "invalid_request_error")
    assert error_body(error) == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "a.b",
            "code": "unsupported_media_type",
        }
    }


def test_the_text_of_a_bug_stays_here() -> None:
    assert error_body(ModelError("/secret/path is None"))["error"]["message"] == INTERNAL_MESSAGE


def test_a_long_model_name_is_cut() -> None:
    error = ModelNotFound("x" * 10_000)
    assert error.field == "model" and len(error.message) < 300


@pytest.mark.parametrize(
    ("wait_s", "header"),
    [(None, "1"), (0.0, "1"), (0.2, "1"), (1.2, "2"), (7.0, "7"), (1e6, str(MAX_RETRY_AFTER_S))],
)
@pytest.mark.parametrize("kind", [Overloaded, Unavailable])
def test_waits_are_whole_seconds_between_one_and_the_longest_that_clients_accept(
    kind: type[ServingError], wait_s: float | None, header: str
) -> None:
    assert error_response(kind("busy", retry_after_s=wait_s)).headers["retry-after"] == header


@pytest.mark.parametrize("kind", [FingerprintMismatch, DeadlineExceeded, ModelError])
def test_what_fails_the_same_way_again_says_so(kind: type[ServingError]) -> None:
    response = error_response(kind("x"))
    assert response.headers["x-should-retry"] == "false" and "retry-after" not in response.headers


@pytest.mark.parametrize("kind", [InvalidRequest, Overloaded, Unavailable])
def test_the_rest_is_left_to_the_client(kind: type[ServingError]) -> None:
    assert "x-should-retry" not in error_response(kind("x")).headers


def test_a_body_that_may_never_end_closes_the_connection() -> None:
    error = RequestError("slow", code="timeout", status=408)
    assert error_response(error).headers["connection"] == "close"


class Uploading:
    """A client in the middle of its upload: these chunks, then `end`."""

    def __init__(self, chunk: bytes, count: int, end: Message) -> None:
        self._chunk = chunk
        self._end = end
        self.left = count
        self.sent: list[Message] = []
        self.left_when_answered: int | None = None

    async def receive(self) -> Message:
        if not self.left:
            return self._end
        self.left -= 1
        return {"type": "http.request", "body": self._chunk, "more_body": True}

    async def send(self, message: Message) -> None:
        if message.get("body"):
            self.left_when_answered = self.left
        self.sent.append(message)

    async def get(self, response: JSONResponse) -> None:
        await response({"type": "http"}, self.receive, self.send)
        start, body, end = self.sent
        assert start["status"] == 413 and (b"connection", b"close") in start["headers"]
        assert json.loads(body["body"])["error"]["code"] == "request_too_large"
        assert (body["more_body"], end["more_body"]) == (True, False)


@pytest.mark.parametrize("end", [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])
async def test_a_refused_upload_is_answered_first_and_then_read_to_its_end(end: Message) -> None:
    client = Uploading(b"x" * 1000, 50, end)
    await client.get(error_response(TOO_LARGE))
    assert (client.left_when_answered, client.left) == (50, 0)


async def test_a_refused_upload_is_not_read_forever() -> None:
    client = Uploading(bytes(LINGER_BYTES // 4), 100, {"type": "http.disconnect"})
    await client.get(error_response(TOO_LARGE))
    assert client.left >= 95, "four chunks are the limit, and one more may be on its way"


async def test_a_refused_upload_that_stalls_is_given_up() -> None:
    class Stalled(Uploading):
        async def receive(self) -> Message:
            await asyncio.Event().wait()
            return self._end

    client = Stalled(b"", 0, {"type": "http.disconnect"})
    start = time.monotonic()
    await client.get(error_response(TOO_LARGE))
    assert LINGER_S * 0.9 < time.monotonic() - start < LINGER_S + 2
