"""What is a format at all, and which field an error names."""

from __future__ import annotations

import json

import pytest

from llm_service.response_format import MAX_FORMAT_BYTES, FormatKind, ResponseFormat, grammar_text
from protos.errors import InvalidRequest


def schema(text: str) -> ResponseFormat:
    return ResponseFormat(FormatKind.JSON_SCHEMA, text)


@pytest.mark.parametrize(
    ("form", "field"),
    [
        (schema("{"), "json_schema"),
        (schema("[]"), "json_schema"),
        (schema("false"), "json_schema"),
        (schema('{"maximum": 1e999}'), "json_schema"),
        (schema('{"a": ' + "[" * 100_000), "json_schema"),
        (schema('{"a": ' + "9" * 10_000 + "}"), "json_schema"),
        (schema(json.dumps({"enum": ["x" * MAX_FORMAT_BYTES]})), "json_schema"),
        (ResponseFormat(FormatKind.REGEX), "regex"),
        (ResponseFormat(FormatKind.REGEX, "a" * (MAX_FORMAT_BYTES + 1)), "regex"),
        (ResponseFormat(FormatKind.CHOICE), "choice"),
        (ResponseFormat(FormatKind.CHOICE, choices=("a", "")), "choice"),
        (ResponseFormat(FormatKind.CHOICE, choices=("a",) * 2000), "choice"),
    ],
)
def test_what_is_no_format_is_refused_by_name(form: ResponseFormat, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        form.rule()
    assert refused.value.field == f"response_format.{field}"
    assert len(refused.value.message) < 200


def test_options_of_the_library_are_ours() -> None:
    rule = schema('{"x-guidance": {"lenient": true}}').rule()
    assert "lenient" not in rule and "whitespace_pattern" in rule


def test_a_schema_that_allows_everything_may_be_true() -> None:
    assert schema("true").rule() == schema("{}").rule()


def test_a_leading_space_is_part_of_the_grammar_only_where_decoding_drops_it() -> None:
    assert grammar_text("/a/", strips_leading_space=False) == "start: answer\nanswer: /a/\n"
    assert grammar_text("/a/", strips_leading_space=True) == 'start: " " answer\nanswer: /a/\n'
