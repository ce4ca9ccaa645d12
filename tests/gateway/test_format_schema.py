"""Every way to ask for a form of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.format_schema import AskedFormat, FormatFields

SCHEMA = {"type": "object", "properties": {"é": {"const": "猫"}}}
TEXT = json.dumps(SCHEMA, ensure_ascii=False)
NAMED = {"type": "json_schema", "json_schema": {"name": "cat-1", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"response_format": {"type": "json_object"}}, AskedFormat("json_object", "response_format")),
        (
            {"response_format": NAMED},
            AskedFormat("json_schema", "response_format.json_schema.schema", TEXT),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            AskedFormat("json_schema", "response_format.json_schema.schema", TEXT),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "regex": None, "disable_fallback": False}},
            AskedFormat("json_schema", "structured_outputs.json", TEXT),
        ),
        ({"structured_outputs": {"json": TEXT}}, AskedFormat("json_schema", "structured_outputs.json", TEXT)),
        ({"structured_outputs": {"regex": "a+"}}, AskedFormat("regex", "structured_outputs.regex", "a+")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            AskedFormat("choice", "structured_outputs.choice", choices=("a", "b")),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            AskedFormat("json_object", "structured_outputs.json_object"),
        ),
        ({"guided_json": SCHEMA}, AskedFormat("json_schema", "guided_json", TEXT)),
        ({"guided_json": TEXT}, AskedFormat("json_schema", "guided_json", TEXT)),
        ({"guided_regex": "a+"}, AskedFormat("regex", "guided_regex", "a+")),
        ({"guided_choice": ["猫"]}, AskedFormat("choice", "guided_choice", choices=("猫",))),
        ({"regex": "a+"}, AskedFormat("regex", "regex", "a+")),
        ({"json_schema": TEXT}, AskedFormat("json_schema", "json_schema", TEXT)),
    ],
)
def test_each_way_to_ask(fields: dict[str, Any], asked: AskedFormat) -> None:
    assert FormatFields.model_validate(fields).formats == [asked]


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_free_text_is_no_format(response_format: Any) -> None:
    fields = FormatFields.model_validate({"response_format": response_format, "guided_json": None})
    assert fields.formats == []
