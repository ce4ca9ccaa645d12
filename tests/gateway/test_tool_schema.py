"""Tools, formats and thinking over HTTP, through the official client; the language model is scripted."""

from __future__ import annotations

import json
from typing import Any

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
    started,
    usage,
)

LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
USER: Any = {"role": "user", "content": "hi"}


def calls(*pieces: tuple[int, str, str], index: int = 0) -> pb.GenerateResponse:
    deltas = [pb.ToolCallDelta(index=call, name=name, arguments=text) for call, name, text in pieces]
    return pb.GenerateResponse(delta=pb.Delta(index=index, token_ids=[1], tool_calls=deltas))


def thinks(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(token_ids=[1], reasoning=text))


CALLING = replies(
    started(),
    thinks("I must "),
    thinks("look."),
    delta("Let me see."),
    calls((0, "look", "")),
    calls((0, "", '{"at":')),
    calls((0, "", '"猫"}'), (1, "stop", "")),
    calls((1, "", "{}")),
    finished(reason=pb.FINISH_REASON_TOOL_CALLS),
    usage(completion=7),
)


async def test_a_whole_answer_and_a_stream_call_the_same() -> None:
    async with gateway_before(CALLING) as gateway:
        chat = gateway.openai.chat.completions
        whole = (await chat.create(model=MODEL, messages=[USER], tools=[LOOK])).choices[0]
        async with chat.stream(model=MODEL, messages=[USER], tools=[LOOK]) as stream:
            final = (await stream.get_final_completion()).choices[0]
    for choice in (whole, final):
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
        assert choice.message.model_dump()["reasoning_content"] == "I must look."
        functions = [call.function for call in choice.message.tool_calls or [] if call.type == "function"]
        called = [(function.name, function.arguments) for function in functions]
        assert called == [("look", '{"at":"猫"}'), ("stop", "{}")]
        ids = [call.id for call in choice.message.tool_calls or []]
        assert len(set(ids)) == 2 and all(ids)


async def test_a_stream_of_calls_is_what_clients_put_together() -> None:
    async with gateway_before(CALLING) as gateway:
        response = await gateway.post(ask(stream=True, tools=[LOOK]))
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-2]]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert [list(each) for each in deltas[:4]] == [
        ["role", "content"],
        ["reasoning_content"],
        ["reasoning_content"],
        ["content"],
    ]
    pieces = [each["tool_calls"][0] for each in deltas[4:-1]]
    assert [piece["index"] for piece in pieces] == [0, 0, 0, 1, 1]
    assert ["id" in piece for piece in pieces] == [True, False, False, True, False]
    assert deltas[-1] == {}


async def test_thoughts_have_the_newer_name_too_where_the_operator_says_so() -> None:
    async with gateway_before(CALLING, config=GatewayConfig(also_reasoning=True)) as gateway:
        message = (await gateway.post(ask())).json()["choices"][0]["message"]
        text = (await gateway.post(ask(stream=True))).text
    assert message["reasoning"] == message["reasoning_content"] == "I must look."
    assert '"delta":{"reasoning_content":"look.","reasoning":"look."}' in text


async def test_calls_and_their_answers_go_back() -> None:
    async with gateway_before() as gateway:
        function: Any = {"name": "look", "arguments": '{"at": 1}'}
        call: Any = {"id": "call_1", "type": "function", "function": function}
        assistant: Any = {"role": "assistant", "content": None, "tool_calls": [call]}
        answer: Any = {"role": "tool", "tool_call_id": "call_1", "content": "a cat"}
        await gateway.openai.chat.completions.create(
            model=MODEL, messages=[USER, assistant, answer], tools=[LOOK], tool_choice="none"
        )
        (request,) = gateway.llm.requests
    assert [message.role for message in request.messages] == ["user", "assistant", "tool"]
    assert request.messages[1].tool_calls[0].name == "look"
    assert request.messages[2].parts[0].text == "a cat"
    assert request.tools.choice == pb.TOOL_CHOICE_NONE


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "fields", "param"),
    [
        (
            "tools.tools[0].parameters",
            {"tools": [LOOK], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        ("tools.name", {"tools": [LOOK], "tool_choice": LOOK}, "tool_choice.function.name"),
        (
            "response_format.json_schema",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.schema",
        ),
        ("response_format.regex", {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ],
)
async def test_what_the_language_model_refuses_is_named_as_the_body_does(
    field: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    script = replies(InvalidRequest("is too complex to be enforced", field=field))
    async with gateway_before(script) as gateway:
        fault = await gateway.error(ask(stream=stream, **fields))
    assert fault == (400, "invalid_value", param, "is too complex to be enforced")


async def test_a_completion_is_kept_to_its_format() -> None:
    async with gateway_before() as gateway:
        completion = gateway.openai.completions
        await completion.create(model=MODEL, prompt="a", extra_body={"guided_choice": ["a", "b"]})
        assert list(gateway.llm.requests[0].response_format.choice.texts) == ["a", "b"]
        gateway.llm.script = replies(InvalidRequest("is bad", field="response_format.regex"))
        with pytest.raises(openai.BadRequestError) as refused:
            await completion.create(model=MODEL, prompt="a", extra_body={"regex": "("})
        assert refused.value.param == "regex"
        fault = await gateway.error({"model": MODEL, "prompt": "a", "tools": [LOOK]}, "/v1/completions")
        assert fault[:3] == (400, "unsupported_parameter", "tools")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 9}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_other_endpoints_live_with_thoughts_and_calls(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async with gateway_before(CALLING) as gateway:
        response = await gateway.post({"model": MODEL, "stream": stream, **body}, path)
    assert response.status_code == 200 and "Let me see." in response.text
    assert '"error":{' not in response.text


async def test_leaving_amid_a_call_cancels_it() -> None:
    async with gateway_before(hangs_after(started(), calls((0, "look", "")))) as gateway:
        body = ask(stream=True, tools=[LOOK])
        async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if "look" in line:
                    break
        await gateway.llm.cancelled.wait()
