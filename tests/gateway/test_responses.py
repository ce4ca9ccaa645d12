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
    called,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    says,
    started,
    thought,
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


def _thinks_and_calls() -> Any:
    pieces = (called(0, name="look"), called(0, '{"at":'), called(0, ' "cat"}'), called(1, "{}", "rest"))
    end = finished(reason=pb.FINISH_REASON_TOOL_CALLS)
    return replies(started(), thought("hm"), thought("!"), delta("I look."), *pieces, end, usage())


async def test_thoughts_texts_and_calls_are_items() -> None:
    async with gateway_before(_thinks_and_calls()) as gateway:
        response = await gateway.openai.responses.create(model=MODEL, input="hi")
    reasoning, message, look, rest = response.output
    assert reasoning.type == "reasoning" and reasoning.content is not None
    assert [part.text for part in reasoning.content] == ["hm!"] and reasoning.summary == []
    assert message.type == "message" and response.output_text == "I look."
    assert look.type == "function_call" and (look.name, look.arguments) == ("look", '{"at": "cat"}')
    assert rest.type == "function_call" and (rest.name, rest.arguments) == ("rest", "{}")
    assert look.call_id != rest.call_id and response.status == "completed"
    assert len({item.id for item in response.output}) == 4


async def test_official_stream_helper_follows_thoughts_and_calls() -> None:
    async with (
        gateway_before(_thinks_and_calls()) as gateway,
        gateway.openai.responses.stream(model=MODEL, input="hi") as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2:6] == ["output_item.added", "content_part.added", *["reasoning_text.delta"] * 2]
    assert kinds[6:9] == ["reasoning_text.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done"]
    assert kinds[15:20] == [*call, "output_item.done"]
    (done, _) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert (done.name, done.arguments, done.output_index) == ("look", '{"at": "cat"}', 2)
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[2].arguments == done.arguments  # type: ignore[union-attr]


async def test_a_call_cut_short_is_incomplete() -> None:
    script = replies(started(), called(0, '{"a', "f"), finished(reason=pb.FINISH_REASON_LENGTH), usage())
    async with gateway_before(script) as gateway:
        response = await gateway.openai.responses.create(model=MODEL, input="hi")
    (call,) = response.output
    assert call.type == "function_call" and (call.status, response.status) == ("incomplete", "incomplete")


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


LOOK: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {}},
    "strict": True,
}


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (None, pb.ToolUse(choice=pb.TOOL_CHOICE_AUTO)),
        ("required", pb.ToolUse(choice=pb.TOOL_CHOICE_REQUIRED)),
        ({"type": "function", "name": "look"}, pb.ToolUse(choice=pb.TOOL_CHOICE_NAMED, name="look")),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
            pb.ToolUse(choice=pb.TOOL_CHOICE_AUTO, allowed=["look"]),
        ),
    ],
)
async def test_tools_and_their_choice_are_passed_on_and_echoed(choice: Any, asked: pb.ToolUse) -> None:
    async with gateway_before() as gateway:
        body = _body(tools=[LOOK], tool_choice=choice, parallel_tool_calls=False)
        response = (await gateway.post(body, PATH)).json()
    asked.tools.add(name="look", description="Looks.", parameters=json.dumps(LOOK["parameters"]))
    asked.single_call = True
    assert gateway.llm.requests[0].tools == asked
    assert response["tools"] == [LOOK] and response["parallel_tool_calls"] is False
    assert response["tool_choice"] == (choice or "auto")


async def test_calls_and_their_outputs_become_messages() -> None:
    items: list[Any] = [
        {"role": "user", "content": "look"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "rest", "arguments": '{"s":1}'},
        {"type": "function_call_output", "call_id": "b", "output": "rested"},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [
                {"type": "input_text", "text": "seen"},
                {"type": "input_image", "image_url": PNG_URI},
            ],
        },
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
    ]
    async with gateway_before() as gateway:
        await gateway.openai.responses.create(model=MODEL, input=items)
    messages = gateway.llm.requests[0].messages
    assert [each.role for each in messages] == ["user", "assistant", "tool", "tool", "user", "assistant"]
    calls = [(call.name, call.arguments) for call in messages[1].tool_calls]
    assert calls == [("look", "{}"), ("rest", '{"s":1}')] and messages[1].parts[0].text == "I look."
    assert [message.parts[0].text for message in messages[2:4]] == ["seen", "rested"], "the calls' order"
    assert messages[4].parts[0].image.data == PNG
    assert [call.name for call in messages[5].tool_calls] == ["look"]


async def test_a_schema_and_an_effort_are_passed_on() -> None:
    schema = {"type": "object"}
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    async with gateway_before() as gateway:
        response = await gateway.openai.responses.create(
            model=MODEL, input="hi", text=text, reasoning={"effort": "low"}
        )
    (request,) = gateway.llm.requests
    assert request.response_format.json_schema == json.dumps(schema) and request.thinking.enabled
    assert response.text is not None and response.text.model_dump()["format"]["name"] == "n"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("tools.tools[0].parameters", "tools.0.parameters"),
        ("tools.name", "tool_choice.name"),
        ("response_format.json_schema", "text.format.schema"),
        ("messages[1].parts[0].image.data", "input.0.output.0.image_url"),
    ],
)
async def test_what_the_model_refuses_is_named(field: str, param: str) -> None:
    items = [
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_image", "image_url": PNG_URI}],
        }
    ]
    body = {
        "model": MODEL,
        "input": items,
        "tools": [LOOK],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    }
    async with gateway_before(replies(InvalidRequest("bad", field=field))) as gateway:
        status, _, place, _ = await gateway.error(body, PATH)
    assert (status, place) == (400, param)


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
        ({"input": [{"type": "web_search_call"}]}, "unsupported_value", "input.0"),
        ({"input": [{"type": "function_call"}]}, "missing_required_parameter", "input.0.call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": 1}]},
            "invalid_value",
            "input.0.output",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "sound"}]}]},
            "unsupported_content_part",
            "input.0.output.0.type",
        ),
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
        ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools.0.type"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "invalid_value", "tools.0.name"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "loud"}, "invalid_value", "tool_choice"),
        ({"n": 2}, "unsupported_parameter", "n"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
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
