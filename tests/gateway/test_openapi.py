"""The OpenAPI document, and what a fuzzer finds that reads it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from gateway.openapi import openapi_document
from protos import language_model_pb2 as pb
from tests.gateway.scripted import delta, finished, gateway_before, started, usage

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
    assert chat["properties"]["tools"]["anyOf"][0]["items"] == {"$ref": "#/components/schemas/Tool"}
    assert {"tool_choice", "response_format", "structured_outputs", "reasoning_effort"} < set(
        chat["properties"]
    )
    assert "json" in schemas["StructuredOutputs"]["properties"]
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


async def _answers_each_choice(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield started()
    for index in range(max(1, request.sampling.n)):
        yield delta("a", index)
        yield finished(index)
    yield usage()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread with an event loop of its own: the fuzzer blocks."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop, urls = asyncio.Event(), []

    async def serve() -> None:
        async with gateway_before(_answers_each_choice) as gateway:
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


# In both modes: what the document allows, and what it forbids.
schema = schemathesis.openapi.from_dict(openapi_document())
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_that_the_document_allows_or_forbids_is_a_server_error(
    case: schemathesis.Case, url: str
) -> None:
    case.call_and_validate(base_url=url, checks=[not_a_server_error], timeout=20)
