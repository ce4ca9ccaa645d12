"""Large JSON is told without walking over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.errors import RequestError
from gateway.json_size import MAX_JSON_BYTES, is_larger
from gateway.parsing import parse_request
from gateway.schema import ChatCompletionRequest


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("abc", 4),
        (None, 1),
        ([], 1),
        ({"ab": [1, 2.5, True]}, 8),
        ([[["a"]], {"b": {"c": "d"}}], 13),
        (10**100, 84),
    ],
)
def test_everything_counts(value: Any, size: int) -> None:
    assert is_larger(value, size - 1) and not is_larger(value, size)


def test_nothing_is_looked_at_behind_the_limit() -> None:
    class Watched(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield "a" * 11
            raise AssertionError

    assert is_larger([Watched(), "b"], 10)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"tools":[{"type":"function","function":{"name":"f","parameters":LARGE}}]', "tools"),
        (
            '"response_format":{"type":"json_schema","json_schema":{"schema":LARGE}}',
            "response_format.json_schema.schema",
        ),
        ('"structured_outputs":{"json":LARGE}', "structured_outputs.json"),
        ('"guided_json":LARGE', "guided_json"),
        ('"json_schema":LARGE', "json_schema"),
    ],
)
def test_a_large_schema_is_refused_by_name(field: str, param: str) -> None:
    large = '{"enum":[' + ",".join(['"abcdefg"'] * (MAX_JSON_BYTES // 8)) + "]}"
    body = '{"messages":[{"role":"user","content":"a"}],' + field.replace("LARGE", large) + "}"
    with pytest.raises(RequestError, match=f"at most {MAX_JSON_BYTES} bytes") as refused:
        parse_request(body.encode(), ChatCompletionRequest)
    assert refused.value.field == param
