"""LlamaIndex's client of servers like OpenAI's: chat, streams, completions, tools and structured output."""

from __future__ import annotations

from typing import Any, Literal

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

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


class Look(BaseModel):
    """What was seen."""

    color: Literal["red", "green", "blue", "yellow"]


def paint(color: str) -> str:
    """Paint something."""
    return f"painted {color}"


def _llm(server: Server, **more: Any) -> OpenAILike:
    return OpenAILike(
        model=server.model,
        api_base=server.openai_url,
        api_key="none",
        context_window=4096,
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=200,
        max_retries=0,
        timeout=TIMEOUT_S,
        **more,
    )


def _asked(server: Server, name: str, question: str) -> list[ChatMessage]:
    image = ImageBlock(image=server.picture(name), image_mimetype="image/png")
    return [ChatMessage(role="user", blocks=[image, TextBlock(text=question)])]


def chat(server: Server) -> None:
    llm, messages = _llm(server), _asked(server, "things.png", COLOR_QUESTION)
    first = llm.chat(messages)
    assert first.message.content == COLOR
    second = llm.chat([*messages, first.message, ChatMessage(role="user", content=PLACE_QUESTION)])
    assert second.message.content == PLACE


def stream(server: Server) -> None:
    pieces = list(_llm(server).stream_chat(_asked(server, "sign.png", SIGN_QUESTION)))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content == SIGN


async def asynchronous(server: Server) -> None:
    answer = await _llm(server).achat(_asked(server, "things.png", COUNT_QUESTION))
    assert answer.message.content == COUNT


def complete(server: Server) -> None:
    """A chat of one message."""
    assert _llm(server).complete("Hello").text == GREETING
    assert "".join(piece.delta or "" for piece in _llm(server).stream_complete("Hello")) == GREETING


def a_tool_is_called(server: Server) -> None:
    llm, tool = _llm(server), FunctionTool.from_defaults(paint, fn_schema=Look)
    messages = _asked(server, "things.png", COLOR_QUESTION)
    first = llm.chat_with_tools([tool], chat_history=messages, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(first)
    assert call.tool_name == "paint" and call.tool_kwargs["color"] in COLORS
    options = {"tool_call_id": call.tool_id}
    result = ChatMessage(role="tool", content=paint(**call.tool_kwargs), additional_kwargs=options)
    second = llm.chat_with_tools([tool], chat_history=[*messages, first.message, result])
    assert second.message.content
    *_, last = llm.stream_chat_with_tools([tool], chat_history=messages, tool_required=True)
    (streamed,) = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs


def structured_output(server: Server) -> None:
    messages = _asked(server, "things.png", COLOR_QUESTION)
    for llm in (_llm(server), _llm(server, should_use_structured_outputs=True)):
        answer = llm.as_structured_llm(Look).chat(messages)
        assert isinstance(answer.raw, Look) and answer.raw.color in COLORS


CHECKS = (chat, stream, asynchronous, complete, a_tool_is_called, structured_output)

if __name__ == "__main__":
    raise SystemExit(main("llama-index-llms-openai-like", CHECKS))
