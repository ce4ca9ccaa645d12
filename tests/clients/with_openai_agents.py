"""OpenAI's Agents SDK: agents that look at pictures and use a tool, over chat and over responses."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

from tests.clients.checks import (
    COLOR,
    COLOR_QUESTION,
    COLORS,
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


def _agents(server: Server, required: bool = False, **more: Any) -> list[Agent]:
    client = AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)
    settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required" if required else None)
    return [
        Agent("Observer", model=kind(server.model, client), model_settings=settings, **more)
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel)
    ]


def _asked(server: Server, name: str, question: str) -> list[Any]:
    image = {"type": "input_image", "image_url": server.data_uri(name), "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": question}]}]


async def run(server: Server) -> None:
    for agent in _agents(server):
        first = await Runner.run(agent, _asked(server, "things.png", COLOR_QUESTION))
        assert first.final_output == COLOR
        more = [*first.to_input_list(), {"role": "user", "content": PLACE_QUESTION}]
        assert (await Runner.run(agent, more)).final_output == PLACE


async def run_streamed(server: Server) -> None:
    for agent in _agents(server):
        result = Runner.run_streamed(agent, _asked(server, "sign.png", SIGN_QUESTION))
        pieces = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        assert "".join(pieces) == result.final_output == SIGN


async def structured_output(server: Server) -> None:
    for agent in _agents(server, output_type=Look):
        result = await Runner.run(agent, _asked(server, "things.png", COLOR_QUESTION))
        assert isinstance(result.final_output, Look) and result.final_output.color in COLORS


async def a_tool_is_run(server: Server) -> None:
    """A call that must come, its result, and an answer: two turns of the model."""
    painted: list[str] = []

    @function_tool
    def paint(color: Literal["red", "green", "blue", "yellow"]) -> str:
        """Paint something."""
        painted.append(color)
        return f"painted {color}"

    for agent in _agents(server, required=True, tools=[paint]):
        whole = await Runner.run(agent, _asked(server, "things.png", COLOR_QUESTION), max_turns=3)
        streamed = Runner.run_streamed(agent, _asked(server, "things.png", COLOR_QUESTION), max_turns=3)
        items = [
            event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"
        ]
        assert items[:2] == ["tool_called", "tool_output"]
        assert whole.final_output and whole.final_output == streamed.final_output
    assert len(painted) == 4 and set(painted) <= set(COLORS)


CHECKS = (run, run_streamed, structured_output, a_tool_is_run)

if __name__ == "__main__":
    raise SystemExit(main("openai-agents", CHECKS))
