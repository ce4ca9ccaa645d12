"""Paths of a chat request, in the words of the request that it was made from."""

from __future__ import annotations

import pytest

from gateway.adaptation import Adaptation, Place
from gateway.errors import RequestError

ADAPTATION = Adaptation(
    places=(
        Place("instructions"),
        Place("input.0.content"),
        Place("input.2.content"),
        Place("input.3.content", ("input.3.content.2", "input.1.output.0"), ("input.4", "input.5")),
    ),
    names={
        "max_completion_tokens": "max_output_tokens",
        "image_url.url": "source",
        "response_format.json_schema": "text.format",
        "response_format": "text.format",
        "parameters": "input_schema",
    },
    messages="input",
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("messages", "input"),
        ("messages.0.content", "instructions"),
        ("messages.2.content.1.text", "input.2.content.1.text"),
        ("messages.1.content.3.image_url.url", "input.0.content.3.source"),
        ("messages.3.content.0.text", "input.3.content.2.text"),
        ("messages.3.content.1.image_url.url", "input.1.output.0.source"),
        ("messages.3.tool_calls.1.function.arguments", "input.5.arguments"),
        ("messages.3.tool_calls.0", "input.4"),
        ("messages.9.content", "messages.9.content"),
        ("response_format.type", "text.format.type"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("tools.2.function.parameters", "tools.2.input_schema"),
        ("tool_choice.allowed_tools.tools.0.function.name", "tool_choice.tools.0.name"),
        ("max_completion_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
    ],
)
def test_every_path_has_its_counterpart(path: str, expected: str) -> None:
    assert ADAPTATION.param(path) == expected


def test_an_error_is_reworded_in_field_and_text() -> None:
    with pytest.raises(RequestError) as caught, ADAPTATION.reworded():
        raise RequestError("'messages.2.content.0.text' is bad.", param="messages.2.content.0.text")
    assert caught.value.field == "input.2.content.0.text"
    assert caught.value.message == "'input.2.content.0.text' is bad."


def test_what_the_chat_schema_refuses_is_reworded() -> None:
    with pytest.raises(RequestError) as caught:
        ADAPTATION.chat({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0})
    assert caught.value.field == "max_output_tokens" and "'max_output_tokens'" in caught.value.message
