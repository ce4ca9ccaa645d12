"""The official client of Anthropic: messages, their stream helper, counted tokens, tools, its tool runner."""

from __future__ import annotations

import json
from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic

from tests.clients.checks import (
    COLOR,
    COLOR_QUESTION,
    COLORS,
    COUNT,
    COUNT_QUESTION,
    PLACE,
    PLACE_QUESTION,
    SIGN,
    SIGN_QUESTION,
    TIMEOUT_S,
    Server,
    main,
)

PAINT: Any = {
    "name": "paint",
    "description": "Paint something.",
    "input_schema": {
        "type": "object",
        "properties": {"color": {"enum": list(COLORS)}},
        "required": ["color"],
        "additionalProperties": False,
    },
}
GREEDY: dict[str, Any] = {"max_tokens": 200, "extra_body": {"temperature": 0}}


def _client(server: Server) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=TIMEOUT_S)


def _asked(server: Server, name: str, question: str) -> list[Any]:
    source = {"type": "base64", "media_type": "image/png", "data": server.base64(name)}
    content = [{"type": "image", "source": source}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def messages(server: Server) -> None:
    with _client(server) as client:
        asked = _asked(server, "things.png", COLOR_QUESTION)
        first = client.messages.create(model=server.model, messages=asked, **GREEDY)
        assert _text(first) == COLOR and first.stop_reason == "end_turn"
        asked += [
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": PLACE_QUESTION},
        ]
        second = client.messages.create(model=server.model, messages=asked, **GREEDY)
        assert _text(second) == PLACE


def stream_helper(server: Server) -> None:
    asked = _asked(server, "sign.png", SIGN_QUESTION)
    with (
        _client(server) as client,
        client.messages.stream(model=server.model, messages=asked, **GREEDY) as stream,
    ):
        assert "".join(stream.text_stream) == _text(stream.get_final_message()) == SIGN


async def the_asynchronous_client(server: Server) -> None:
    asked = _asked(server, "things.png", COUNT_QUESTION)
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        assert _text(await client.messages.create(model=server.model, messages=asked, **GREEDY)) == COUNT


def counted_tokens(server: Server) -> None:
    asked = _asked(server, "things.png", COLOR_QUESTION)
    with _client(server) as client:
        count = client.messages.count_tokens(model=server.model, messages=asked, tools=[PAINT])
        usage = client.messages.create(model=server.model, messages=asked, tools=[PAINT], **GREEDY).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def a_tool_is_called(server: Server) -> None:
    settings: dict[str, Any] = {"model": server.model, "tools": [PAINT], **GREEDY}
    with _client(server) as client:
        asked = _asked(server, "things.png", COLOR_QUESTION)
        with client.messages.stream(messages=asked, tool_choice={"type": "any"}, **settings) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            first = stream.get_final_message()
        (call,) = [block for block in first.content if block.type == "tool_use"]
        assert first.stop_reason == "tool_use" and json.loads("".join(pieces)) == call.input
        assert call.name == "paint" and call.input["color"] in COLORS
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "painted"}
        asked += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = client.messages.create(messages=asked, **settings)
        assert _text(second) and second.stop_reason == "end_turn"


def the_tool_runner_runs_a_tool(server: Server) -> None:
    painted = []

    @anthropic.beta_tool
    def paint(number: int) -> str:
        """Paint something.

        Args:
            number: of the color
        """
        painted.append(number)
        return "painted"

    with _client(server) as client:
        runner = client.beta.messages.tool_runner(
            model=server.model,
            messages=_asked(server, "things.png", COLOR_QUESTION),
            tools=[paint],
            tool_choice={"type": "tool", "name": "paint"},
            max_iterations=2,
            **GREEDY,
        )
        turns = list(runner)
    assert len(painted) == len(turns) == 2 and all(turn.stop_reason == "tool_use" for turn in turns)


def errors_are_exceptions_with_names(server: Server) -> None:
    with _client(server) as client:
        for error, model, asked in (
            (anthropic.NotFoundError, "other", [{"role": "user", "content": "hi"}]),
            (anthropic.BadRequestError, server.model, [{"role": "user", "content": "word " * 60_000}]),
        ):
            try:
                client.messages.create(model=model, messages=asked, **GREEDY)
            except error as caught:
                assert caught.request_id
            else:
                raise AssertionError(f"no {error.__name__}")


CHECKS = (
    messages,
    stream_helper,
    the_asynchronous_client,
    counted_tokens,
    a_tool_is_called,
    the_tool_runner_runs_a_tool,
    errors_are_exceptions_with_names,
)

if __name__ == "__main__":
    raise SystemExit(main("anthropic", CHECKS))
