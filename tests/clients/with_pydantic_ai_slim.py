"""Pydantic AI: agents that look at pictures, over chat and over responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.checks import (
    COLOR,
    COLOR_QUESTION,
    COLORS,
    PLACE,
    PLACE_QUESTION,
    SIGN,
    SIGN_QUESTION,
    Server,
    main,
)

SETTINGS: Any = {"temperature": 0, "max_tokens": 200}


class Look(BaseModel):
    """What was seen."""

    color: Literal["red", "green", "blue", "yellow"]


def _models(server: Server) -> list[Any]:
    provider = OpenAIProvider(base_url=server.openai_url, api_key="none")
    return [kind(server.model, provider=provider) for kind in (OpenAIChatModel, OpenAIResponsesModel)]


def _asked(server: Server, name: str, question: str) -> list[Any]:
    return [BinaryContent(server.picture(name), media_type="image/png"), question]


async def run(server: Server) -> None:
    for model in _models(server):
        agent = Agent(model, model_settings=SETTINGS)
        first = await agent.run(_asked(server, "things.png", COLOR_QUESTION))
        assert first.output == COLOR and first.usage.input_tokens > 64
        second = await agent.run(PLACE_QUESTION, message_history=first.all_messages())
        assert second.output == PLACE


async def run_stream(server: Server) -> None:
    for model in _models(server):
        agent = Agent(model, model_settings=SETTINGS)
        async with agent.run_stream(_asked(server, "sign.png", SIGN_QUESTION)) as result:
            assert "".join([text async for text in result.stream_text(delta=True)]) == SIGN


async def structured_output(server: Server) -> None:
    for model in _models(server):
        for output in (ToolOutput(Look), NativeOutput(Look)):
            agent = Agent(model, output_type=output, model_settings=SETTINGS)
            result = await agent.run(_asked(server, "things.png", COLOR_QUESTION))
            assert isinstance(result.output, Look) and result.output.color in COLORS


async def structured_output_is_streamed(server: Server) -> None:
    for model in _models(server):
        agent = Agent(model, output_type=ToolOutput(Look), model_settings=SETTINGS)
        async with agent.run_stream(_asked(server, "things.png", COLOR_QUESTION)) as result:
            assert (await result.get_output()).color in COLORS


async def a_tool_is_offered(server: Server) -> None:
    """The demo model knows no tools: it answers, and is right."""
    for model in _models(server):
        agent = Agent(model, model_settings=SETTINGS)

        @agent.tool_plain
        def paint(color: Literal["red", "green", "blue", "yellow"]) -> str:
            """Paint something."""
            return f"painted {color}"

        assert (await agent.run(_asked(server, "things.png", COLOR_QUESTION))).output == COLOR


CHECKS = (run, run_stream, structured_output, structured_output_is_streamed, a_tool_is_offered)

if __name__ == "__main__":
    raise SystemExit(main("pydantic-ai-slim", CHECKS))
