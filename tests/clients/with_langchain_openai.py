"""LangChain's client of OpenAI: invoked, streamed, with tools and structured output; chat and responses."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
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


class Look(BaseModel):
    """What was seen."""

    color: Literal["red", "green", "blue", "yellow"]


@tool
def paint(color: Literal["red", "green", "blue", "yellow"]) -> str:
    """Paint something."""
    return f"painted {color}"


def _chat(server: Server, **more: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"temperature": 0, "max_retries": 0, "timeout": TIMEOUT_S, "max_tokens": 200}
    return ChatOpenAI(base_url=server.openai_url, api_key="none", model=server.model, **settings, **more)


def _asked(server: Server, name: str, question: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": server.data_uri(name)}}
    return [HumanMessage([image, {"type": "text", "text": question}])]


def invoke(server: Server) -> None:
    chat, messages = _chat(server), _asked(server, "things.png", COLOR_QUESTION)
    first = chat.invoke(messages)
    assert first.text == COLOR and first.usage_metadata is not None
    assert chat.invoke([*messages, first, HumanMessage(PLACE_QUESTION)]).text == PLACE


def stream(server: Server) -> None:
    whole: Any = None
    for chunk in _chat(server, stream_usage=True).stream(_asked(server, "sign.png", SIGN_QUESTION)):
        whole = chunk if whole is None else whole + chunk
    assert whole.text == SIGN and whole.usage_metadata["output_tokens"] > 0


async def asynchronous_batch(server: Server) -> None:
    questions = {COUNT_QUESTION: COUNT, COLOR_QUESTION: COLOR}
    asked = [_asked(server, "things.png", question) for question in questions]
    answers = await _chat(server).abatch(asked)
    assert [answer.text for answer in answers] == list(questions.values())


def structured_output(server: Server) -> None:
    for method in ("json_schema", "function_calling"):
        chat = _chat(server).with_structured_output(Look, method=method)
        look = chat.invoke(_asked(server, "things.png", COLOR_QUESTION))
        assert isinstance(look, Look) and look.color in COLORS


def a_tool_is_called(server: Server) -> None:
    chat, messages = _chat(server), _asked(server, "things.png", COLOR_QUESTION)
    first: Any = None
    for chunk in chat.bind_tools([paint], tool_choice="any", strict=True).stream(messages):
        first = chunk if first is None else first + chunk
    (call,) = first.tool_calls
    assert call["name"] == "paint" and call["args"]["color"] in COLORS
    result = paint.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([paint]).invoke([*messages, AIMessage("", tool_calls=first.tool_calls), result])
    assert answer.text and not answer.tool_calls


def responses(server: Server) -> None:
    chat, messages = _chat(server, use_responses_api=True), _asked(server, "things.png", COLOR_QUESTION)
    first = chat.invoke(messages)
    assert first.text == COLOR
    assert chat.invoke([*messages, first, HumanMessage(PLACE_QUESTION)]).text == PLACE
    assert "".join(chunk.text for chunk in chat.stream(_asked(server, "sign.png", SIGN_QUESTION))) == SIGN


def responses_call_a_tool(server: Server) -> None:
    chat, messages = _chat(server, use_responses_api=True), _asked(server, "things.png", COLOR_QUESTION)
    first = chat.bind_tools([paint], tool_choice="paint", strict=True).invoke(messages)
    (call,) = first.tool_calls
    assert call["name"] == "paint" and call["args"]["color"] in COLORS
    assert chat.bind_tools([paint]).invoke([*messages, first, paint.invoke(call)]).text
    look = chat.with_structured_output(Look, method="json_schema").invoke(messages)
    assert isinstance(look, Look)


CHECKS = (
    invoke,
    stream,
    asynchronous_batch,
    structured_output,
    a_tool_is_called,
    responses,
    responses_call_a_tool,
)

if __name__ == "__main__":
    raise SystemExit(main("langchain-openai", CHECKS))
