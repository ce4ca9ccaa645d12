"""What holds whatever API a client speaks: keys and limits, CORS, slow clients, media by URL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from gateway.config import GatewayConfig
from protos import language_model_pb2 as pb
from protos.errors import InvalidRequest
from tests.gateway.scripted import (
    MODEL,
    ask,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    says,
    started,
    usage,
)
from tests.gateway.test_access import KEY, OTHER, bearer, with_keys

CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
URL = "https://example.org/a"
IMAGE = {"type": "image", "source": {"type": "url", "url": URL}}
ABOUT_IMAGE = [{"role": "user", "content": [IMAGE]}]

GENERATING: dict[str, dict[str, Any]] = {
    CHAT: ask(),
    "/v1/completions": {"prompt": [72, 105]},
    "/v1/responses": {"input": "hi"},
    MESSAGES: ask(max_tokens=9),
}
COUNTING: dict[str, dict[str, Any]] = {
    COUNT: ask("x" * 60),
    "/tokenize": {"prompt": "x" * 60},
    "/v1/tokenize": {"messages": ask("x" * 60)["messages"]},
    "/detokenize": {"tokens": [72] * 60},
    "/v1/detokenize": {"tokens": [72] * 60},
}
ENDPOINTS = [("POST", path) for path in (*GENERATING, *COUNTING)] + [
    ("GET", path) for path in ("/v1/models", "/v1/models/x", "/version", "/openapi.json", "/metrics")
]
BODIES = {**GENERATING, **COUNTING}


def assert_shape(path: str, body: dict[str, Any], kind: str) -> None:
    """An error of the API that the path belongs to."""
    assert body["error"]["type"] == kind
    if path.startswith(MESSAGES):
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"} and body["request_id"]
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"type", "message", "param", "code"}


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_a_stranger_is_refused_in_the_words_of_the_api(method: str, path: str) -> None:
    async with gateway_before(config=with_keys()) as gateway:
        for headers in ({}, {"x-api-key": "wrong"}, bearer("wrong")):
            response = await gateway.http.request(method, path, headers=headers, json=BODIES.get(path))
            assert response.status_code == 401
            assert response.headers["x-should-retry"] == "false"
            assert_shape(path, response.json(), "authentication_error")
        assert not gateway.llm.requests and not gateway.llm.tokenized


@pytest.mark.parametrize(("method", "path"), [each for each in ENDPOINTS if each[1] != "/v1/models/x"])
@pytest.mark.parametrize(
    "headers", [bearer(KEY), {"x-api-key": KEY}, {"x-api-key": KEY, **bearer("a-token-of-another-server")}]
)
async def test_a_key_opens_every_door(method: str, path: str, headers: dict[str, str]) -> None:
    async with gateway_before(config=with_keys()) as gateway:
        response = await gateway.http.request(method, path, headers=headers, json=BODIES.get(path))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
async def test_tokens_of_answers_count_for_their_key(path: str, stream: bool) -> None:
    script = replies(started(50), delta("a", num_tokens=60), finished(), usage(50, 60))
    async with gateway_before(script, config=with_keys(key_tokens_per_minute=100)) as gateway:
        body = {**GENERATING[path], "stream": stream}
        assert (await gateway.post(body, path, headers=bearer(KEY))).status_code == 200
        refused = await gateway.post(body, path, headers=bearer(KEY))
        assert refused.status_code == 429 and "tokens per minute" in refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert_shape(path, refused.json(), "rate_limit_error")
        assert (await gateway.post(body, path, headers=bearer(OTHER))).status_code == 200


@pytest.mark.parametrize("path", COUNTING)
async def test_tokens_that_are_only_counted_count_too(path: str) -> None:
    async with gateway_before(config=with_keys(key_tokens_per_minute=100)) as gateway:
        statuses = [
            (await gateway.post(COUNTING[path], path, headers=bearer(KEY))).status_code for _ in range(3)
        ]
    assert statuses == [200, 200, 429]


async def test_counting_tokens_of_pictures_costs_what_they_cost() -> None:
    body = {"model": MODEL, "messages": ABOUT_IMAGE}
    config = with_keys(key_tokens_per_minute=100)
    async with gateway_before(hangs_after(started(300)), config=config) as gateway:
        assert (await gateway.post(body, COUNT, headers=bearer(KEY))).json() == {"input_tokens": 300}
        refused = await gateway.post(body, COUNT, headers=bearer(KEY))
    assert refused.status_code == 429
    assert_shape(COUNT, refused.json(), "rate_limit_error")


async def test_each_prompt_of_a_completion_counts() -> None:
    script = replies(started(30), delta("a", num_tokens=1), finished(), usage(30, 1))
    async with gateway_before(script, config=with_keys(key_tokens_per_minute=100)) as gateway:
        body = {"prompt": [[72]] * 4}
        assert (await gateway.post(body, "/v1/completions", headers=bearer(KEY))).status_code == 200
        assert (await gateway.post(body, "/v1/completions", headers=bearer(KEY))).status_code == 429


@pytest.mark.parametrize("path", GENERATING)
async def test_a_stream_holds_its_place_until_it_ends(path: str) -> None:
    script = hangs_after(started(), delta("a"))
    async with gateway_before(script, config=with_keys(key_concurrency=1)) as gateway:
        body = {**GENERATING[path], "stream": True}
        async with gateway.http.stream("POST", path, json=body, headers=bearer(KEY)) as stream:
            await anext(stream.aiter_bytes())
            refused = await gateway.post(body, path, headers=bearer(KEY))
        assert refused.status_code == 429 and "at a time" in refused.text
        async with asyncio.timeout(5):
            while (await gateway.http.get("/version", headers=bearer(KEY))).status_code != 200:
                await asyncio.sleep(0.01)


async def test_official_clients_raise_what_they_call_these_errors() -> None:
    config = with_keys(key_requests_per_minute=1)
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    async with gateway_before(says("Hello"), config=config) as gateway:
        claude = gateway.anthropic.with_options(api_key=KEY)
        gpt = gateway.openai.with_options(api_key=OTHER)
        with pytest.raises(anthropic.AuthenticationError):
            await gateway.anthropic.messages.create(model=MODEL, max_tokens=9, messages=messages)
        with pytest.raises(openai.AuthenticationError):
            await gateway.openai.responses.create(model=MODEL, input="hi")
        await claude.messages.create(model=MODEL, max_tokens=9, messages=messages)
        with pytest.raises(anthropic.RateLimitError):
            await claude.messages.count_tokens(model=MODEL, messages=messages)
        await gpt.responses.create(model=MODEL, input="hi")
        with pytest.raises(openai.RateLimitError):
            await gpt.completions.create(model=MODEL, prompt="hi")


async def test_every_answer_has_the_id_of_its_request() -> None:
    paths = [*ENDPOINTS, ("GET", "/"), ("GET", "/page/app.js"), ("GET", "/health"), ("GET", "/ready")]
    strange = [("GET", "/nothing"), ("PUT", CHAT), ("POST", "/v1/messages/nothing"), ("GET", "/page/nothing")]
    async with gateway_before(config=with_keys()) as gateway:
        for headers in ({}, bearer(KEY)):
            for method, path in paths + strange:
                response = await gateway.http.request(
                    method, path, headers={**headers, "x-request-id": "of-mine"}, json=BODIES.get(path)
                )
                assert response.headers["x-request-id"] == "of-mine", path
                theirs = response.headers.get("request-id")
                assert theirs == ("of-mine" if path.startswith(MESSAGES) else None)


async def test_official_clients_know_the_id_of_their_request() -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    async with gateway_before(says("Hello")) as gateway:
        answer = await gateway.openai.chat.completions.create(
            model=MODEL, messages=messages, extra_headers={"x-request-id": "one"}
        )
        message = await gateway.anthropic.messages.create(
            model=MODEL, max_tokens=9, messages=messages, extra_headers={"x-request-id": "two"}
        )
    assert (answer._request_id, message._request_id) == ("one", "two")


@pytest.mark.parametrize("has_keys", [False, True])
async def test_the_document_says_whether_a_key_is_needed(has_keys: bool) -> None:
    async with gateway_before(config=with_keys() if has_keys else None) as gateway:
        document = (await gateway.http.get("/openapi.json", headers=bearer(KEY))).json()
    assert ("security" in document) is ("securitySchemes" in document["components"]) is has_keys
    is_open = {
        path
        for path, item in document["paths"].items()
        for each in item.values()
        if each.get("security") == []
    }
    assert is_open == ({"/health", "/ready"} if has_keys else set())


@pytest.mark.parametrize("path", BODIES)
async def test_pages_of_allowed_origins_may_ask_and_read(path: str) -> None:
    config = with_keys(cors_origins=("https://a.example",))
    origin = {"origin": "https://a.example"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key,anthropic-version,content-type",
    }
    async with gateway_before(config=config) as gateway:
        asked = await gateway.http.options(path, headers={**origin, **preflight})
        answered = await gateway.post(BODIES[path], path, headers={**origin, "x-api-key": KEY})
        refused = await gateway.post(BODIES[path], path, headers=origin)
    assert (asked.status_code, answered.status_code, refused.status_code) == (200, 200, 401)
    for response in (asked, answered, refused):
        assert response.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_that_does_not_come_has_a_deadline(path: str) -> None:
    async with gateway_before(config=GatewayConfig(body_timeout_s=0.2)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(_head(path, 1000) + b"{")
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert_shape(path, json.loads(answer.partition(b"\r\n\r\n")[2]), "invalid_request_error")


@pytest.mark.parametrize("path", GENERATING)
async def test_a_stream_that_nobody_reads_ends_with_its_generation(path: str) -> None:
    async def endless(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        while True:
            yield delta("a" * 10_000)
            await asyncio.sleep(0)

    async with gateway_before(endless, config=GatewayConfig(write_timeout_s=0.3)) as gateway:
        body = json.dumps({**GENERATING[path], "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(_head(path, len(body)) + body)
        await reader.readexactly(100)
        writer.transport.pause_reading()
        async with asyncio.timeout(10):
            await gateway.llm.cancelled.wait()
        writer.transport.abort()


def _head(path: str, length: int) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def _chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}]}


PDF = {"type": "document", "source": {"type": "url", "url": URL}}
BY_URL: list[tuple[str, dict[str, Any], str, str]] = [
    (
        CHAT,
        _chat({"type": "image_url", "image_url": {"url": URL}}),
        "image",
        "messages.0.content.0.image_url.url",
    ),
    (
        CHAT,
        _chat({"type": "video_url", "video_url": {"url": URL}}),
        "video",
        "messages.0.content.0.video_url.url",
    ),
    (
        CHAT,
        _chat({"type": "file", "file": {"file_url": URL}}),
        "document",
        "messages.0.content.0.file.file_url",
    ),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
        "image",
        "input.0.content.0.image_url",
    ),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": URL}]}]},
        "document",
        "input.0.content.0.file_url",
    ),
    (MESSAGES, {"max_tokens": 9, "messages": ABOUT_IMAGE}, "image", ""),
    (MESSAGES, {"max_tokens": 9, **_chat(PDF)}, "document", ""),
    (COUNT, {"messages": ABOUT_IMAGE}, "image", ""),
    (COUNT, _chat(PDF), "document", ""),
]


@pytest.mark.parametrize(("path", "body", "kind", "param"), BY_URL)
async def test_media_by_url_go_to_the_encoder_as_they_are(
    path: str, body: dict[str, Any], kind: str, param: str
) -> None:
    async with gateway_before() as gateway:
        assert (await gateway.post(body, path)).status_code == 200
    (part,) = gateway.llm.requests[0].messages[0].parts
    assert part.WhichOneof("part") == kind and getattr(part, kind).url == URL


@pytest.mark.parametrize(("path", "body", "kind", "param"), BY_URL)
async def test_a_url_that_is_not_fetched_is_named_as_the_client_calls_it(
    path: str, body: dict[str, Any], kind: str, param: str
) -> None:
    refusal = InvalidRequest("the URL could not be fetched", field=f"messages[0].parts[0].{kind}.url")
    async with gateway_before(replies(refusal)) as gateway:
        response = await gateway.post(body, path)
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"] == "the URL could not be fetched"
    assert_shape(path, response.json(), "invalid_request_error")
    if param:
        noun = {"document": "file"}.get(kind, kind)
        assert (error["param"], error["code"]) == (param, f"invalid_{noun}_url")


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, json.loads(json.dumps(body).replace(URL, "file:///etc/passwd"))) for path, body, *_ in BY_URL],
)
async def test_nothing_else_is_read_from_elsewhere(path: str, body: dict[str, Any]) -> None:
    async with gateway_before() as gateway:
        response = await gateway.post(body, path)
        assert not gateway.llm.requests
    assert response.status_code == 400 and "must be a data URI" in response.text
