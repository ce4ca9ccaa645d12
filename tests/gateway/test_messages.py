"""Anthropic's API: the official client in front, a real gRPC service behind."""

from __future__ import annotations

import base64
import json
from typing import Any

import anthropic
import pytest

from gateway.config import GatewayConfig
from gateway.messages_schema import MessagesRequest, adapt_messages
from protos import language_model_pb2 as pb
from protos.errors import ContextLengthExceeded, InvalidRequest, ModelError, Overloaded, Unavailable
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

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
PNG_BASE64 = base64.b64encode(PNG).decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG_BASE64}}
HI: list[Any] = [{"role": "user", "content": "hi"}]


def _body(messages: Any = None, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 9, "messages": messages or HI, **fields}


def _events(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


LOOK: dict[str, Any] = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}
CALL: dict[str, Any] = {"type": "tool_use", "name": "look", "input": {"at": "é"}}


async def _fault(gateway: Any, body: Any, path: str = PATH) -> tuple[int, str, str]:
    """(status, type, message)"""
    response = await gateway.post(body, path)
    error = response.json()
    assert set(error) == {"type", "error", "request_id"} and error["type"] == "error"
    assert set(error["error"]) == {"type", "message"}
    assert error["request_id"] == response.headers["x-request-id"]
    return response.status_code, error["error"]["type"], error["error"]["message"]


async def test_official_client_gets_a_message() -> None:
    script = replies(started(), delta("Hello"), delta(" there"), finished(), usage(prompt=7, cached=4))
    more = {"temperature": 0.5, "top_k": 3}
    async with gateway_before(script) as gateway:
        message = await gateway.anthropic.messages.create(
            model=MODEL, max_tokens=9, messages=HI, system="Be kind", extra_body=more
        )
    (request,) = gateway.llm.requests
    assert [(each.role, each.parts[0].text) for each in request.messages] == [
        ("system", "Be kind"),
        ("user", "hi"),
    ]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (9, 0.5, 3)
    (block,) = message.content
    assert block.type == "text" and block.text == "Hello there"
    assert message.id.startswith("msg_") and message.role == "assistant" and message.model == MODEL
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (3, 4)
    assert message.usage.output_tokens == 2


async def test_official_stream_helper_accepts_the_stream() -> None:
    async with (
        gateway_before(says("Hel", "lo")) as gateway,
        gateway.anthropic.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream,
    ):
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    assert text == "Hello" and message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 2)


async def test_events_come_in_the_official_order() -> None:
    async with gateway_before(says("Hel", "lo")) as gateway:
        response = await gateway.post(_body(stream=True), PATH)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = _events(response.text)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["input_tokens"] == 7 and events[0]["message"]["content"] == []
    assert events[2]["delta"] == {"type": "text_delta", "text": "Hel"}
    assert events[5]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[5]["usage"]["output_tokens"] == 2


def _thinks_and_calls() -> Any:
    pieces = (called(0, name="look"), called(0, '{"at":'), called(0, ' "cat"}'), called(1, "{}", "rest"))
    end = finished(reason=pb.FINISH_REASON_TOOL_CALLS)
    return replies(started(), thought("hm"), thought("!"), delta("I look."), *pieces, end, usage())


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_texts_and_calls_are_blocks(stream: bool) -> None:
    async with gateway_before(_thinks_and_calls()) as gateway:
        settings: Any = {"model": MODEL, "max_tokens": 99, "messages": HI}
        if stream:
            async with gateway.anthropic.messages.stream(**settings) as events:
                message: Any = await events.get_final_message()
        else:
            message = await gateway.anthropic.messages.create(**settings)
    thinking, text, look, rest = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "hm!", "")
    assert (text.type, text.text) == ("text", "I look.")
    assert (look.type, look.name, look.input) == ("tool_use", "look", {"at": "cat"})
    assert (rest.name, rest.input) == ("rest", {}) and look.id != rest.id
    assert message.stop_reason == "tool_use"


async def test_blocks_are_streamed_one_behind_the_other() -> None:
    async with gateway_before(_thinks_and_calls()) as gateway:
        events = _events((await gateway.post(_body(stream=True), PATH)).text)
    blocks = [(event["type"].removeprefix("content_block_"), event["index"]) for event in events[1:-2]]
    lengths = {0: 2, 1: 1, 2: 2, 3: 1}
    assert blocks == [
        (kind, index) for index, length in lengths.items() for kind in ("start", *["delta"] * length, "stop")
    ]
    calls = [event["delta"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"]
    assert [call["partial_json"] for call in calls] == ['{"at":', ' "cat"}', "{}"]


async def test_a_call_cut_short_has_no_input() -> None:
    script = replies(started(), called(0, '{"a', "f"), finished(reason=pb.FINISH_REASON_LENGTH), usage())
    async with gateway_before(script) as gateway:
        message = await gateway.anthropic.messages.create(model=MODEL, max_tokens=9, messages=HI)
    (block,) = message.content
    assert block.type == "tool_use" and block.input == {} and message.stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (pb.Finished(reason=pb.FINISH_REASON_LENGTH), "max_tokens", None),
        (pb.Finished(reason=pb.FINISH_REASON_STOP, stop_string="END"), "stop_sequence", "END"),
        (pb.Finished(reason=pb.FINISH_REASON_STOP), "end_turn", None),
    ],
)
async def test_the_reason_to_stop_is_told(end: pb.Finished, reason: str, sequence: str | None) -> None:
    script = replies(started(), delta("a"), pb.GenerateResponse(finished=end), usage())
    async with gateway_before(script) as gateway:
        message = await gateway.anthropic.messages.create(
            model=MODEL, max_tokens=9, messages=HI, stop_sequences=["END"]
        )
        events = _events((await gateway.post(_body(stream=True), PATH)).text)
    assert list(gateway.llm.requests[0].sampling.stop) == ["END"]
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


async def test_blocks_become_parts() -> None:
    pdf = base64.b64encode(b"%PDF-").decode()
    content: list[Any] = [
        {"type": "text", "text": "what?", "cache_control": {"type": "ephemeral"}},
        IMAGE,
        {"type": "image", "source": {"type": "url", "url": f"data:image/png;base64,{PNG_BASE64}"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": pdf},
        },
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "notes"}},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    answer: Any = [thought, {"type": "text", "text": "a cat"}]
    messages: list[Any] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
        *HI,
    ]
    async with gateway_before(says("yes")) as gateway:
        system: Any = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
        await gateway.anthropic.messages.create(model=MODEL, max_tokens=9, messages=messages, system=system)
    system, first, second, _ = gateway.llm.requests[0].messages
    assert system.role == "system" and system.parts[0].text == "Be\nbrief"
    kinds = [part.WhichOneof("part") for part in first.parts]
    assert kinds == ["text", "image", "image", "document", "text"]
    assert first.parts[1].image.data == first.parts[2].image.data == PNG
    assert first.parts[3].document.data == b"%PDF-" and first.parts[4].text == "notes"
    assert [part.text for part in second.parts] == ["a cat"]


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "'messages.0.role'"),
        ({"messages": [{"role": "user", "content": 1}]}, "'messages.0.content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "'messages.0.content.0.tool_use_id'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            "'messages.0.content.0.type'",
        ),
        (
            {"messages": [{"role": "user", "content": [{**CALL, "id": "a"}]}]},
            "'messages.0.content.0'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "'messages.0.content.0'",
        ),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "'messages.0.content.0'"),
        (
            {
                "messages": HI,
                "system": "x",
                "tools": [{"name": "t"}],
            },
            "'tools.0.input_schema'",
        ),
        (
            {
                "system": "x",
                "messages": [
                    {"role": "user", "content": [{**IMAGE, "source": {**IMAGE["source"], "data": "!"}}]}  # type: ignore[dict-item]
                ],
            },
            "'messages.0.content.0.source'",
        ),
        ({"system": [{"type": "text", "text": 1}]}, "'system.0.text'"),
        ({"messages": HI, "tools": [{**LOOK, "type": "bash_20250124"}]}, "'tools.0.type'"),
        ({"messages": HI, "tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"messages": HI, "tools": [LOOK], "tool_choice": {"type": "all"}}, "'tool_choice'"),
        ({"messages": HI, "thinking": {"type": "loud"}}, "'thinking.type'"),
        ({"messages": HI, "output_format": {"type": "json_schema", "schema": {}}}, "'output_format'"),
        ({"messages": HI, "output_config": {"format": {"type": "xml"}}}, "'output_config.format.type'"),
    ],
)
async def test_what_is_wrong_is_named(fields: dict[str, Any], place: str, path: str) -> None:
    async with gateway_before() as gateway:
        body = {**_body(), **fields} if path == PATH else {"model": MODEL, "messages": HI, **fields}
        status, kind, message = await _fault(gateway, body, path)
    assert (status, kind) == (400, "invalid_request_error")
    assert place in message and not gateway.llm.requests


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"temperature": 1.5}, "'temperature'"),
        ({"stop_sequences": [""]}, "'stop_sequences'"),
    ],
)
async def test_what_is_wrong_with_sampling_is_named(fields: dict[str, Any], place: str) -> None:
    async with gateway_before() as gateway:
        fault = await _fault(gateway, {**_body(), **fields})
    assert fault[:2] == (400, "invalid_request_error") and place in fault[2]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("bad", field="messages[0].parts[0]"), 400, "invalid_request_error"),
        (ContextLengthExceeded("9 > 8"), 400, "invalid_request_error"),
        (Overloaded("full"), 429, "rate_limit_error"),
        (Unavailable("gone"), 503, "overloaded_error"),
        (ModelError("secret"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_models_errors_have_anthropics_shape(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    async with gateway_before(replies(error)) as gateway:
        fault = await _fault(gateway, _body(stream=stream))
    assert fault[:2] == (status, kind) and "secret" not in fault[2]


async def test_an_unknown_model_is_not_found() -> None:
    async with gateway_before() as gateway:
        with pytest.raises(anthropic.NotFoundError):
            await gateway.anthropic.messages.create(model="other", max_tokens=1, messages=HI)


async def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    async with gateway_before(replies(started(), delta("x"), ModelError("secret"))) as gateway:
        with pytest.raises(anthropic.APIError) as caught:
            async with gateway.anthropic.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream:
                async for _event in stream:
                    pass
    assert "secret" not in str(caught.value)


async def test_silence_is_filled_with_pings_that_the_client_skips() -> None:
    config = GatewayConfig(keepalive_s=0.05)
    async with gateway_before(hangs_after(started()), config=config) as gateway:
        async with gateway.http.stream("POST", PATH, json=_body(stream=True)) as response:
            lines = response.aiter_lines()
            names = [line async for line in _until(lines, "event: ping")]
    assert names == ["event: message_start", "event: ping"]
    await gateway.llm.cancelled.wait()


async def _until(lines: Any, last: str) -> Any:
    async for line in lines:
        if line.startswith("event: "):
            yield line
        if line == last:
            return


async def test_official_client_counts_tokens_of_texts() -> None:
    async with gateway_before() as gateway:
        count = await gateway.anthropic.messages.count_tokens(model=MODEL, messages=HI, system="Be kind")
    assert count.input_tokens == 9 and not gateway.llm.requests
    assert [each.role for each in gateway.llm.tokenized[0].messages.messages] == ["system", "user"]


async def test_tokens_of_pictures_are_counted_by_a_request_that_is_given_up() -> None:
    messages: list[Any] = [{"role": "user", "content": [IMAGE]}]
    async with gateway_before(hangs_after(started(300))) as gateway:
        count = await gateway.anthropic.messages.count_tokens(model=MODEL, messages=messages)
        await gateway.llm.cancelled.wait()
    assert count.input_tokens == 300
    assert gateway.llm.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize(("method", "path", "status"), [("GET", PATH, 405), ("GET", f"{PATH}/x", 404)])
async def test_the_routers_errors_have_anthropics_shape(method: str, path: str, status: int) -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.request(method, path)
    assert response.status_code == status and response.json()["type"] == "error"


@pytest.mark.parametrize(("kind", "asked"), [("disabled", False), ("enabled", True), ("adaptive", None)])
async def test_thinking_may_be_asked_for(kind: str, asked: bool | None) -> None:
    async with gateway_before() as gateway:
        thinking = {"type": kind, "budget_tokens": 1024}
        response = await gateway.post(_body(thinking=thinking, metadata={"user_id": "u"}), PATH)
    (request,) = gateway.llm.requests
    assert response.status_code == 200
    assert (request.thinking.enabled if request.HasField("thinking") else None) is asked


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (None, pb.ToolUse()),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            pb.ToolUse(choice=pb.TOOL_CHOICE_REQUIRED, single_call=True),
        ),
        ({"type": "tool", "name": "look"}, pb.ToolUse(choice=pb.TOOL_CHOICE_NAMED, name="look")),
        ({"type": "none"}, pb.ToolUse(choice=pb.TOOL_CHOICE_NONE)),
    ],
)
async def test_tools_and_their_choice_are_passed_on(choice: Any, asked: pb.ToolUse) -> None:
    async with gateway_before() as gateway:
        await gateway.post(_body(tools=[LOOK], tool_choice=choice), PATH)
    asked.tools.add(name="look", description="Looks.", parameters='{"type": "object"}')
    assert gateway.llm.requests[0].tools == asked


async def test_calls_and_their_results_become_messages() -> None:
    text = {"type": "text", "text": "so?"}
    results = [
        {"type": "tool_result", "tool_use_id": "b", "content": "rested"},
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "seen"}, IMAGE]},
        {"type": "tool_result", "tool_use_id": "c", "is_error": True},
    ]
    calls = [{**CALL, "id": "a"}, {**CALL, "id": "b", "name": "rest", "input": {}}, {**CALL, "id": "c"}]
    messages: list[Any] = [
        *HI,
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *calls]},
        {"role": "user", "content": [*results, text]},
    ]
    async with gateway_before() as gateway:
        await gateway.anthropic.messages.create(model=MODEL, max_tokens=9, messages=messages, tools=[LOOK])
    _, assistant, *answers, user = gateway.llm.requests[0].messages
    assert [(call.name, call.arguments) for call in assistant.tool_calls] == [
        ("look", '{"at": "é"}'),
        ("rest", "{}"),
        ("look", '{"at": "é"}'),
    ]
    assert assistant.parts[0].text == "I look." and {each.role for each in answers} == {"tool"}
    assert [answer.parts[0].text for answer in answers] == ["seen", "rested", ""], "the calls' order"
    assert [part.WhichOneof("part") for part in user.parts] == ["image", "text"] and user.role == "user"


async def test_a_schema_is_passed_on() -> None:
    config: Any = {"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"}
    async with gateway_before() as gateway:
        await gateway.anthropic.messages.create(model=MODEL, max_tokens=9, messages=HI, output_config=config)
    assert gateway.llm.requests[0].response_format.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("tools.0.function.parameters", "tools.0.input_schema"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("messages.1.tool_calls.0.function.name", "messages.0.content.1.name"),
        ("messages.2.content.0.text", "messages.1.content.0.content.1.text"),
        ("messages.3.content.0.image_url.url", "messages.1.content.0.content.0.source"),
        ("messages.3.content.1.text", "messages.1.content.1.text"),
    ],
)
def test_paths_lead_back_to_the_blocks(path: str, place: str) -> None:
    text = {"type": "text", "text": "a"}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE, text]}
    messages = [
        {"role": "assistant", "content": [text, {**CALL, "id": "a"}]},
        {"role": "user", "content": [result, text]},
    ]
    request = MessagesRequest.model_validate({"max_tokens": 1, "system": "s", "messages": messages})
    assert adapt_messages(request)[1].param(path) == place


async def test_tokens_of_tools_are_counted_by_a_request_that_is_given_up() -> None:
    async with gateway_before(hangs_after(started(50))) as gateway:
        count = await gateway.anthropic.messages.count_tokens(model=MODEL, messages=HI, tools=[LOOK])
        await gateway.llm.cancelled.wait()
    assert count.input_tokens == 50 and gateway.llm.requests[0].tools.tools[0].name == "look"


async def test_the_official_tool_runner_does_without_threads() -> None:
    """It asks for one, is told that there are none, and sends the whole conversation each time."""
    answers = [
        replies(
            started(),
            called(0, '{"at": "cat"}', "look"),
            finished(reason=pb.FINISH_REASON_TOOL_CALLS),
            usage(),
        ),
        says("a cat"),
    ]

    @anthropic.beta_async_tool
    async def look(at: str) -> str:
        """Looks."""
        return f"seen: {at}"

    def script(request: pb.GenerateRequest) -> Any:
        return answers.pop(0)(request)

    async with gateway_before(script) as gateway:
        refused = await gateway.post(_body(thread={"type": "create"}), PATH)
        runner = gateway.anthropic.beta.messages.tool_runner(
            model=MODEL, max_tokens=9, messages=HI, tools=[look]
        )
        final = await runner.until_done()
    assert refused.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert final.content[0].type == "text" and final.content[0].text == "a cat"
    first, second = gateway.llm.requests
    assert [message.role for message in second.messages] == ["user", "assistant", "tool"]
    assert second.messages[2].parts[0].text == "seen: cat" and second.tools == first.tools
