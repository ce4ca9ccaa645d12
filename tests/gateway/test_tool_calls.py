"""Deltas of tool calls to whole ones."""

from __future__ import annotations

import re

import pytest

from gateway.events import CallDelta
from gateway.tool_calls import ToolCalls
from protos.errors import ModelError


def test_pieces_join_and_each_call_keeps_its_own_id() -> None:
    calls = ToolCalls()
    first = calls.add(CallDelta(0, '{"a"', "look"))
    second = calls.add(CallDelta(1, "", "stop"))
    assert calls.add(CallDelta(0, ":1}")) is first and calls.add(CallDelta(1, "{}")) is second
    assert [(call.name, call.arguments) for call in calls.calls] == [("look", '{"a":1}'), ("stop", "{}")]
    assert first.id != second.id and re.fullmatch(r"call_[0-9a-f]{24}", first.id)
    assert ToolCalls().add(CallDelta(0, "", "look")).id != first.id


@pytest.mark.parametrize("delta", [CallDelta(1, "", "x"), CallDelta(0, "{}"), CallDelta(2, "{}")])
def test_a_call_must_begin_with_its_name_in_order(delta: CallDelta) -> None:
    with pytest.raises(ModelError):
        ToolCalls().add(delta)


def test_a_call_has_one_name() -> None:
    calls = ToolCalls()
    calls.add(CallDelta(0, "", "look"))
    with pytest.raises(ModelError):
        calls.add(CallDelta(0, "", "look"))
