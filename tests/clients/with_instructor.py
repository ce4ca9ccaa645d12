"""Instructor: answers as pydantic models, in each of its modes for OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.clients.checks import COLOR_QUESTION, COLORS, TIMEOUT_S, Server, main

ANY: dict[str, Any] = {"temperature": 0, "max_tokens": 300, "max_retries": 0}


class Look(BaseModel):
    """What was seen.  Closed: the demo model would go on with keys of its own."""

    model_config = ConfigDict(extra="forbid")

    color: Literal["red", "green", "blue", "yellow"]


class Scene(BaseModel):
    """What was seen, in order."""

    model_config = ConfigDict(extra="forbid")

    looks: list[Look] = Field(min_length=1, max_length=3)


def _openai(server: Server) -> OpenAI:
    return OpenAI(base_url=server.openai_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)


def _asked(server: Server) -> list[Any]:
    image = instructor.Image.from_raw_base64(server.base64("things.png"))
    return [{"role": "user", "content": [image, COLOR_QUESTION]}]


def _look(server: Server, mode: instructor.Mode) -> None:
    client = instructor.from_openai(_openai(server), mode=mode)
    look, raw = client.chat.completions.create_with_completion(
        model=server.model, messages=_asked(server), response_model=Look, **ANY
    )
    assert look.color in COLORS and raw.usage.prompt_tokens > 64


def tools(server: Server) -> None:
    _look(server, instructor.Mode.TOOLS)


def strict_tools(server: Server) -> None:
    _look(server, instructor.Mode.TOOLS_STRICT)


def json_schema(server: Server) -> None:
    _look(server, instructor.Mode.JSON_SCHEMA)


def nested_models(server: Server) -> None:
    client = instructor.from_openai(_openai(server), mode=instructor.Mode.JSON_SCHEMA)
    scene = client.chat.completions.create(
        model=server.model, messages=_asked(server), response_model=Scene, **ANY
    )
    assert all(look.color in COLORS for look in scene.looks)


def partial_answers(server: Server) -> None:
    client = instructor.from_openai(_openai(server), mode=instructor.Mode.TOOLS)
    partials = list(
        client.chat.completions.create_partial(
            model=server.model, messages=_asked(server), response_model=Look, **ANY
        )
    )
    assert len(partials) > 1 and partials[-1].color in COLORS


async def asynchronous(server: Server) -> None:
    openai = AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)
    client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
    look = await client.chat.completions.create(
        model=server.model, messages=_asked(server), response_model=Look, **ANY
    )
    assert look.color in COLORS


CHECKS = (tools, strict_tools, json_schema, nested_models, partial_answers, asynchronous)

if __name__ == "__main__":
    raise SystemExit(main("instructor", CHECKS))
