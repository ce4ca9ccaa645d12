"""LiteLLM through three of its providers: OpenAI's, the one for hosted vLLM, and Anthropic's."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import litellm
from pydantic import BaseModel

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

# Closed twice over: LiteLLM takes the one away for hosted vLLM and the other for Anthropic.  Left open,
# the demo model would go on with keys of its own.
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint something.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string", "enum": list(COLORS)}},
            "required": ["color"],
            "additionalProperties": False,
            "maxProperties": 1,
        },
    },
}


class Look(BaseModel):
    color: Literal["red", "green", "blue", "yellow"]


def _settings(server: Server, provider: str = "openai", **more: Any) -> dict[str, Any]:
    base = server.url if provider == "anthropic" else server.openai_url
    settings = {"model": f"{provider}/{server.model}", "api_base": base, "api_key": "none"}
    return {**settings, "temperature": 0, "max_tokens": 200, "timeout": TIMEOUT_S, "num_retries": 0, **more}


def _asked(server: Server, name: str, question: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": server.data_uri(name)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def _converse(server: Server, provider: str) -> None:
    settings, messages = _settings(server, provider), _asked(server, "things.png", COLOR_QUESTION)
    first = litellm.completion(messages=messages, **settings)
    assert first.choices[0].message.content == COLOR and first.usage.prompt_tokens > 64
    messages += [
        {"role": "assistant", "content": COLOR},
        {"role": "user", "content": PLACE_QUESTION},
    ]
    assert litellm.completion(messages=messages, **settings).choices[0].message.content == PLACE
    stream = litellm.completion(messages=_asked(server, "sign.png", SIGN_QUESTION), stream=True, **settings)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SIGN
    assert chunks[-1].choices[0].finish_reason == "stop"


def openai_provider(server: Server) -> None:
    _converse(server, "openai")


def hosted_vllm_provider(server: Server) -> None:
    _converse(server, "hosted_vllm")


def anthropic_provider(server: Server) -> None:
    _converse(server, "anthropic")


async def asynchronous(server: Server) -> None:
    asked = _asked(server, "things.png", COUNT_QUESTION)
    answer = await litellm.acompletion(messages=asked, **_settings(server))
    assert answer.choices[0].message.content == COUNT


def responses(server: Server) -> None:
    content = [
        {"type": "input_image", "image_url": server.data_uri("things.png")},
        {"type": "input_text", "text": COLOR_QUESTION},
    ]
    settings = _settings(server)
    settings["max_output_tokens"] = settings.pop("max_tokens")
    answer = litellm.responses(input=[{"role": "user", "content": content}], **settings)
    assert answer.output[0].content[0].text == COLOR


def structured_output(server: Server) -> None:
    asked = _asked(server, "things.png", COLOR_QUESTION)
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.completion(messages=asked, response_format=Look, **_settings(server, provider))
        assert Look.model_validate_json(answer.choices[0].message.content).color in COLORS


def _call(server: Server, provider: str, choice: Any) -> None:
    settings = _settings(server, provider, tools=[copy.deepcopy(PAINT)])  # LiteLLM changes it in place
    messages = _asked(server, "things.png", COLOR_QUESTION)
    first = litellm.completion(messages=messages, tool_choice=choice, **settings)
    (call,) = first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["color"] in COLORS
    chunks = list(litellm.completion(messages=messages, tool_choice=choice, stream=True, **settings))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    messages += [
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "painted"},
    ]
    assert litellm.completion(messages=messages, **settings).choices[0].message.content


def a_tool_is_called(server: Server) -> None:
    for provider in ("openai", "hosted_vllm", "anthropic"):
        _call(server, provider, "required")
        _call(server, provider, {"type": "function", "function": {"name": "paint"}})


def an_overflow_is_recognised(server: Server) -> None:
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 60_000}], **_settings(server))
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no ContextWindowExceededError")


CHECKS = (
    openai_provider,
    hosted_vllm_provider,
    anthropic_provider,
    asynchronous,
    responses,
    structured_output,
    a_tool_is_called,
    an_overflow_is_recognised,
)

if __name__ == "__main__":
    raise SystemExit(main("litellm", CHECKS))
