"""The OpenAPI document, and what a fuzzer finds that reads it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from gateway.openapi import openapi_document
from tests.gateway.scripted import gateway_before

EXAMPLES = 40  # of each operation


def test_every_route_is_described() -> None:
    assert set(openapi_document()["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
    }


def test_bodies_are_described_by_what_checks_them() -> None:
    schemas = openapi_document()["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["n"]["anyOf"][0] == {"maximum": 128, "minimum": 1, "type": "integer"}
    assert schemas["MessagesRequest"]["required"] == ["messages", "max_tokens"]


def test_every_reference_leads_somewhere() -> None:
    document = openapi_document()
    names = set(document["components"]["schemas"])
    references = set(_references(document))
    assert references and {each.removeprefix("#/components/schemas/") for each in references} <= names


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(each)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread with an event loop of its own: the fuzzer blocks."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop, urls = asyncio.Event(), []

    async def serve() -> None:
        async with gateway_before() as gateway:
            urls.append(str(gateway.http.base_url))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield urls[0].rstrip("/")
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def served(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("served")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_that_the_document_allows_or_forbids_is_a_server_error(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error], timeout=20)
