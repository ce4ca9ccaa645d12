"""The official client of OpenAI: chat, its stream helper, responses, completions, models."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from tests.clients.checks import (
    COLOR,
    COLOR_QUESTION,
    COLORS,
    COUNT,
    COUNT_QUESTION,
    GREETING,
    PLACE,
    PLACE_QUESTION,
    SIGN,
    SIGN_QUESTION,
    TIMEOUT_S,
    Server,
    main,
)


class Paint(BaseModel):
    """Paint something."""

    model_config = ConfigDict(extra="forbid")

    color: Literal["red", "green", "blue", "yellow"]


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.openai_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)


def _asked(server: Server, name: str, question: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": server.data_uri(name), "detail": "auto"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def _items(server: Server, name: str, question: str) -> list[Any]:
    image = {"type": "input_image", "image_url": server.data_uri(name), "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": question}]}]


def models(server: Server) -> None:
    with _client(server) as client:
        (model,) = client.models.list().data
        assert model.id == server.model == client.models.retrieve(model.id).id


def chat(server: Server) -> None:
    with _client(server) as client:
        messages = _asked(server, "things.png", COLOR_QUESTION)
        answer = client.chat.completions.create(model=server.model, messages=messages, temperature=0)
        assert answer.choices[0].message.content == COLOR
        assert answer.usage is not None and answer.usage.prompt_tokens > 64
        messages += [answer.choices[0].message, {"role": "user", "content": PLACE_QUESTION}]
        second = client.chat.completions.create(model=server.model, messages=messages, temperature=0)
        assert second.choices[0].message.content == PLACE


def chat_stream(server: Server) -> None:
    with _client(server) as client:
        stream = client.chat.completions.create(
            model=server.model, messages=_asked(server, "sign.png", SIGN_QUESTION), temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SIGN


def chat_stream_helper(server: Server) -> None:
    options: Any = {"include_usage": True}
    with (
        _client(server) as client,
        client.chat.completions.stream(
            model=server.model,
            messages=_asked(server, "things.png", COUNT_QUESTION),
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream_options=options,
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == COUNT and final.usage is not None
    assert final.choices[0].logprobs is not None


async def chat_with_the_asynchronous_client(server: Server) -> None:
    async with AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0) as client:
        messages = _asked(server, "things.png", PLACE_QUESTION)
        answer = await client.chat.completions.create(model=server.model, messages=messages, temperature=0)
    assert answer.choices[0].message.content == PLACE


def chat_parses_a_schema(server: Server) -> None:
    with _client(server) as client:
        answer = client.chat.completions.parse(
            model=server.model, messages=_asked(server, "things.png", COLOR_QUESTION), response_format=Paint
        )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None and parsed.color in COLORS


def chat_calls_a_tool(server: Server) -> None:
    tools = [openai.pydantic_function_tool(Paint)]
    with _client(server) as client:
        messages = _asked(server, "things.png", COLOR_QUESTION)
        settings: Any = {"model": server.model, "temperature": 0, "tools": tools}
        with client.chat.completions.stream(messages=messages, tool_choice="required", **settings) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert (
            "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
        )
        (call,) = final.choices[0].message.tool_calls or ()
        assert final.choices[0].finish_reason == "tool_calls"
        assert isinstance(call.function.parsed_arguments, Paint)
        messages += [
            final.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "painted"},
        ]
        answer = client.chat.completions.create(messages=messages, **settings)
        assert answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"


def responses(server: Server) -> None:
    with _client(server) as client:
        items = _items(server, "things.png", COLOR_QUESTION)
        first = client.responses.create(model=server.model, input=items, temperature=0)
        assert first.output_text == COLOR and first.status == "completed"
        items += [*first.output, {"role": "user", "content": PLACE_QUESTION}]
        second = client.responses.create(model=server.model, input=items, temperature=0)
        assert second.output_text == PLACE


def responses_stream_helper(server: Server) -> None:
    items = _items(server, "sign.png", SIGN_QUESTION)
    with (
        _client(server) as client,
        client.responses.stream(model=server.model, input=items, temperature=0) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == SIGN


def responses_parse_a_schema(server: Server) -> None:
    items = _items(server, "things.png", COLOR_QUESTION)
    with _client(server) as client:
        answer = client.responses.parse(model=server.model, input=items, text_format=Paint)
    assert answer.output_parsed is not None and answer.output_parsed.color in COLORS


def responses_call_a_tool(server: Server) -> None:
    tool = openai.pydantic_function_tool(Paint)["function"]
    settings: Any = {"model": server.model, "temperature": 0, "tools": [{"type": "function", **tool}]}
    with _client(server) as client:
        items = _items(server, "things.png", COLOR_QUESTION)
        choice: Any = {"type": "function", "name": "Paint"}
        with client.responses.stream(input=items, tool_choice=choice, **settings) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert "response.function_call_arguments.done" in kinds
        (call,) = [item for item in final.output if item.type == "function_call"]
        assert call.name == "Paint" and json.loads(call.arguments)["color"] in COLORS
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "painted"}
        answer = client.responses.create(input=[*items, *final.output, result], **settings)
        assert answer.output_text and answer.status == "completed"


def completions(server: Server) -> None:
    """The template's own ids as a prompt give the chat's answer."""
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with _client(server) as client:
        ids = client.post("/tokenize", body=body, cast_to=dict[str, Any])["tokens"]
        settings: Any = {"model": server.model, "prompt": ids, "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**settings, logprobs=1)
        stream = client.completions.create(**settings, stream=True)
        assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in stream) == GREETING


def errors_are_exceptions_with_names(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "word " * 60_000}]
    with _client(server) as client:
        for error, settings in (
            (openai.NotFoundError, {"model": "other", "messages": [{"role": "user", "content": "hi"}]}),
            (openai.BadRequestError, {"model": server.model, "messages": messages}),
            (openai.BadRequestError, {"model": server.model, "messages": []}),
        ):
            try:
                client.chat.completions.create(**settings)
            except error as caught:
                assert caught.code and caught.request_id
            else:
                raise AssertionError(f"no {error.__name__}")


CHECKS = (
    models,
    chat,
    chat_stream,
    chat_stream_helper,
    chat_with_the_asynchronous_client,
    chat_parses_a_schema,
    chat_calls_a_tool,
    responses,
    responses_stream_helper,
    responses_parse_a_schema,
    responses_call_a_tool,
    completions,
    errors_are_exceptions_with_names,
)

if __name__ == "__main__":
    raise SystemExit(main("openai", CHECKS))
