"""Around a tiny ASGI application: ids, counts, log lines, and errors that nobody caught."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.metrics import GatewayMetrics
from gateway.middleware import RequestMiddleware


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hi"})


async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError("secret")


async def breaks_late(scope: Scope, receive: Receive, send: Send) -> None:
    await answers(scope, receive, send)
    raise KeyError("secret")


class Caller:
    """Calls an application behind the middleware and keeps what it sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.metrics = GatewayMetrics()
        self.sent: list[Message] = []
        self._app = RequestMiddleware(app, self.metrics)

    async def call(self, request_id: str | None = None, **scope: Any) -> Scope:
        headers = [] if request_id is None else [(b"x-request-id", request_id.encode())]
        whole = {"type": "http", "method": "POST", "path": "/made/up", "headers": headers, **scope}
        await self._app(whole, self._receive, self._send)
        return whole

    def value(self, name: str) -> float | None:
        lines = self.metrics.page().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), None)

    def answered_id(self, header: bytes = b"x-request-id") -> str:
        headers = dict(self.sent[0]["headers"])
        return str(headers[header].decode())

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": b""}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def test_an_id_is_echoed_and_known_to_the_application() -> None:
    caller = Caller(answers)
    scope = await caller.call("mine-1")
    assert caller.answered_id() == scope["state"]["request_id"] == "mine-1"


@pytest.mark.parametrize("request_id", [None, "", "two words", "x" * 129, "line\nbreak"])
async def test_an_id_that_is_missing_or_unsafe_is_made(request_id: str | None) -> None:
    caller = Caller(answers)
    await caller.call(request_id)
    assert len(caller.answered_id()) == 32 and caller.answered_id().isalnum()


async def test_anthropics_clients_find_the_id_where_they_look_for_it() -> None:
    caller = Caller(answers)
    await caller.call("mine-1", path="/v1/messages/count_tokens")
    assert caller.answered_id(b"request-id") == caller.answered_id() == "mine-1"
    other = Caller(answers)
    await other.call("mine-1", path="/v1/chat/completions")
    assert b"request-id" not in dict(other.sent[0]["headers"])


async def test_what_the_server_put_into_the_state_stays() -> None:
    scope = await Caller(answers).call(state={"from": "lifespan"})
    assert scope["state"]["from"] == "lifespan"


async def test_requests_count_under_their_route_and_never_under_their_path() -> None:
    caller = Caller(answers)
    await caller.call(route=SimpleNamespace(path="/v1/models/{id}"))
    await caller.call()
    assert caller.value('tessera_gateway_requests_total{route="/v1/models/{id}",status="200"}') == 1
    assert caller.value('tessera_gateway_requests_total{route="other",status="200"}') == 1
    assert "made/up" not in caller.metrics.page().decode()


async def test_requests_are_in_flight_only_while_they_run() -> None:
    seen = []

    async def looks(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(caller.value("tessera_gateway_in_flight"))
        raise KeyError

    caller = Caller(looks)
    await caller.call()
    assert (seen, caller.value("tessera_gateway_in_flight")) == ([1], 0)


async def test_an_error_before_the_answer_is_a_500_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller(breaks)
    await caller.call("bug-1")
    assert caller.sent[0]["status"] == 500 and caller.answered_id() == "bug-1"
    assert json.loads(caller.sent[1]["body"])["error"]["code"] == "internal_error"
    assert b"secret" not in caller.sent[1]["body"] and "secret" in caplog.text
    assert caller.value('tessera_gateway_requests_total{route="other",status="500"}') == 1


async def test_an_error_after_the_start_of_the_answer_is_left_to_the_server() -> None:
    caller = Caller(breaks_late)
    with pytest.raises(KeyError):
        await caller.call()
    assert len(caller.sent) == 2, "no second answer"
    assert caller.value('tessera_gateway_requests_total{route="other",status="200"}') == 1


async def test_a_client_that_left_in_the_middle_is_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def abandoned(scope: Scope, receive: Receive, send: Send) -> None:
        await answers(scope, receive, send)
        scope["state"]["disconnected"] = True

    caller = Caller(abandoned)
    with caplog.at_level(logging.INFO, "gateway.middleware"):
        await caller.call("gone-1")
    assert caller.value("tessera_gateway_disconnects_total") == 1
    (line,) = caplog.messages
    assert line.startswith("POST other 200 ") and line.endswith(" gone-1 disconnected")


async def test_what_is_no_request_passes_untouched() -> None:
    caller = Caller(answers)
    scope = await caller.call(type="lifespan")
    assert "state" not in scope and caller.sent[0]["headers"] == []
