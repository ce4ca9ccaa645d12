"""The responses route: real HTTP in front, a real gRPC service behind."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest

from gateway.config import GatewayConfig
from protos import language_model_pb2 as pb
from protos.errors import ContextLengthExceeded, InvalidRequest, ModelError
from tests.gateway.scripted import (
    MODEL,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    says,
    started,
    usage,
)

PATH = "/v1/responses"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
PNG_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def _body(question: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": question, **fields}


def _events(text: str) -> list[dict[str, Any]]:
    """Of a stream whose every event repeats its name as its type."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_official_client_gets_a_response() -> None:
    async with gateway_before(says("Hello", " there")) as gateway:
        response = await gateway.openai.responses.create(
            model=MODEL, input="hi", instructions="Be kind", max_output_tokens=9, temperature=0.5
        )
    (request,) = gateway.llm.requests
    assert [(each.role, each.parts[0].text) for each in request.messages] == [
        ("system", "Be kind"),
        ("user", "hi"),
    ]
    assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0.5)
    assert response.output_text == "Hello there" and response.status == "completed"
    assert response.id.startswith("resp_") and response.object == "response" and response.model == MODEL
    assert (response.instructions, response.temperature) == ("Be kind", 0.5)
    assert response.usage is not None and response.usage.total_tokens == 9
    assert response.usage.input_tokens_details.cache_write_tokens == 0
    assert response.error is None and response.incomplete_details is None


async def test_official_stream_helper_accepts_the_stream() -> None:
    async with (
        gateway_before(says("Hel", "lo")) as gateway,
        gateway.openai.responses.stream(model=MODEL, input="hi") as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "Hello" and final.status == "completed"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_the_last_event_of_a_stream_is_the_whole_response() -> None:
    async with gateway_before(says("Hel", "lo")) as gateway:
        headers = {"x-request-id": "abc"}
        whole = (await gateway.post(_body(), PATH, headers=headers)).json()
        stream = await gateway.post(_body(stream=True), PATH, headers=headers)
    last = _events(stream.text)[-1]["response"]
    whole["created_at"] = last["created_at"]
    assert last == whole


async def test_an_answer_cut_short_is_incomplete() -> None:
    script = replies(started(), delta("a"), finished(reason=pb.FINISH_REASON_LENGTH), usage())
    async with gateway_before(script) as gateway:
        whole = await gateway.openai.responses.create(model=MODEL, input="hi")
        events = _events((await gateway.post(_body(stream=True), PATH)).text)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    assert events[-1]["type"] == "response.incomplete"
    assert events[-2]["item"]["status"] == "incomplete"


async def test_a_conversation_with_a_picture_becomes_messages() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "what?"},
                {"type": "input_image", "image_url": PNG_URI, "detail": "low"},
            ],
        },
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "a cat", "annotations": []}],
        },
        {"role": "user", "content": "sure?"},
    ]
    async with gateway_before(says("yes")) as gateway:
        await gateway.openai.responses.create(model=MODEL, input=items)
    messages = gateway.llm.requests[0].messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1].parts[1].image.data == PNG
    assert messages[1].parts[1].image.tiling.max_tiles == 1
    assert messages[2].parts[0].text == "a cat"


async def test_logprobs_come_when_included() -> None:
    entry = pb.Logprob(token_id=1, logprob=-0.5, text="a", raw=b"a")
    script = replies(
        started(), delta("a", logprobs=[pb.TokenLogprobs(token=entry, top=[entry])]), finished(), usage()
    )
    body = _body(include=["message.output_text.logprobs"], top_logprobs=1)
    async with gateway_before(script) as gateway:
        whole = (await gateway.post(body, PATH)).json()
        events = _events((await gateway.post({**body, "stream": True}, PATH)).text)
    assert gateway.llm.requests[0].sampling.logprobs == 1
    token = {"token": "a", "logprob": -0.5, "bytes": [97]}
    expected = [{**token, "top_logprobs": [token]}]
    assert whole["output"][0]["content"][0]["logprobs"] == expected
    assert events[4]["logprobs"] == expected and events[5]["logprobs"] == expected


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": []}, "invalid_value", "input"),
        ({"input": 1}, "invalid_value", "input"),
        ({"input": [{"type": "function_call"}]}, "unsupported_value", "input.0"),
        ({"input": [{"role": "user", "content": 1}]}, "invalid_value", "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "ftp://x/"}]}]},
            "invalid_image_url",
            "input.0.content.0.image_url",
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": PNG_URI}]}]},
            "unsupported_content_part",
            "input.0.content.0",
        ),
        ({"instructions": 1}, "invalid_type", "instructions"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"previous_response_id": "resp_1"}, "previous_response_not_found", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_value", "conversation"),
        ({"prompt": {"id": "p"}}, "unsupported_value", "prompt"),
        ({"background": True}, "invalid_value", "background"),
        ({"truncation": "auto"}, "invalid_value", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"text": {"format": {"type": "xml"}}}, "unsupported_response_format", "text.format.type"),
        ({"reasoning": {"effort": "huge"}}, "invalid_value", "reasoning.effort"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
async def test_what_is_wrong_is_named_in_the_words_of_this_api(
    fields: dict[str, Any], code: str, param: str
) -> None:
    async with gateway_before() as gateway:
        status, got, place, message = await gateway.error({**_body(), **fields}, PATH)
    assert (status, got, place) == (404 if code == "model_not_found" else 400, code, param), message
    assert "'messages" not in message and not gateway.llm.requests


async def test_what_asks_for_nothing_is_accepted() -> None:
    body = _body(
        include=[],
        tools=[],
        tool_choice="auto",
        store=True,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        text={"format": {"type": "text"}, "verbosity": "low"},
        reasoning={"effort": None},
        user="me",
        truncation="disabled",
        previous_response_id=None,
    )
    async with gateway_before() as gateway:
        response = await gateway.post(body, PATH)
    assert response.status_code == 200
    assert response.json()["metadata"] == {"a": "b"} and response.json()["store"] is False


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        (InvalidRequest("bad", field="messages[1].parts[0].text"), "invalid_value", "input.0.content.0.text"),
        (InvalidRequest("bad", field="messages[0].parts[0]"), "invalid_value", "instructions"),
        (InvalidRequest("bad", field="sampling.max_tokens"), "invalid_value", "max_output_tokens"),
        (ContextLengthExceeded("9 > 8"), "context_length_exceeded", "input"),
    ],
)
async def test_the_models_errors_name_fields_of_the_body(error: Exception, code: str, param: str) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    async with gateway_before(replies(error)) as gateway:
        fault = await gateway.error(_body(items, instructions="x", max_output_tokens=5), PATH)
    assert fault[:3] == (400, code, param)


async def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    async with gateway_before(replies(started(), delta("x"), ModelError("secret"))) as gateway:
        stream = await gateway.openai.responses.create(model=MODEL, input="hi", stream=True)
        kinds = []
        with pytest.raises(openai.APIError) as caught:
            async for event in stream:
                kinds.append(event.type)
        events = _events((await gateway.post(_body(stream=True), PATH)).text)
    assert "secret" not in caught.value.message
    assert kinds[-1] == "response.failed"
    failed, error = events[-2:]
    assert failed["response"]["status"] == "failed" and failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["output"][0]["content"][0]["text"] == "x"
    assert error["code"] == "internal_error" and error["error"]["type"] == "server_error"


async def test_an_error_before_the_first_event_is_a_status() -> None:
    async with gateway_before(replies(started(), ModelError("x"))) as gateway:
        response = await gateway.post(_body(stream=True), PATH)
    assert response.status_code == 500 and response.headers["x-should-retry"] == "false"


async def test_silence_is_filled_with_comments() -> None:
    async with (
        gateway_before(hangs_after(started()), config=GatewayConfig(keepalive_s=0.05)) as gateway,
        gateway.http.stream("POST", PATH, json=_body(stream=True)) as response,
    ):
        async for chunk in response.aiter_bytes():
            assert chunk.startswith(b": keepalive\n\n")
            break
    await gateway.llm.cancelled.wait()


async def test_an_empty_answer_is_a_whole_stream() -> None:
    async with gateway_before(says()) as gateway:
        response = await gateway.openai.responses.create(model=MODEL, input="hi")
        events = _events((await gateway.post(_body(stream=True), PATH)).text)
    assert response.output_text == ""
    assert [event["type"] for event in events][-2:] == ["response.output_item.done", "response.completed"]
