"""Deltas become items in order, whatever they are cut into."""

from __future__ import annotations

import pytest

from gateway.answer_items import AnswerItems, Closed, Grew, Opened
from gateway.events import CallDelta, Delta, TokenLogprob
from protos.errors import ModelError


def text(piece: str, *logprobs: TokenLogprob) -> Delta:
    return Delta(0, piece, 1, logprobs)


def thought(piece: str) -> Delta:
    return Delta(0, "", 1, reasoning=piece)


def call(index: int, arguments: str = "", name: str = "") -> Delta:
    return Delta(0, "", 1, calls=(CallDelta(index, arguments, name),))


def shown(answer: AnswerItems) -> list[tuple[str, str]]:
    return [(item.kind, item.call.arguments if item.call else item.text) for item in answer.items]


def gathered(*deltas: Delta) -> list[tuple[str, str]]:
    answer = AnswerItems()
    for delta in deltas:
        answer.add(delta)
    answer.finish()
    return shown(answer)


def test_reasoning_text_and_calls_are_items_in_order() -> None:
    deltas = [
        thought("so"),
        thought("?"),
        text("Let me"),
        text(" look.\n"),
        call(0, name="look"),
        call(0, "{}"),
        call(1, "[]", "see"),
        text("done"),
    ]
    assert gathered(*deltas) == [
        ("reasoning", "so?"),
        ("text", "Let me look.\n"),
        ("call", "{}"),
        ("call", "[]"),
        ("text", "done"),
    ]


def test_every_item_is_opened_once_and_closed_before_the_next() -> None:
    answer = AnswerItems()
    steps = [*answer.add(thought("a")), *answer.add(text("b")), *answer.add(call(0, "{}", "f"))]
    steps += answer.finish()
    assert [(type(step), step.item.index) for step in steps] == [
        (kind, index) for index in range(3) for kind in (Opened, Grew, Closed)
    ]
    assert answer.finish() == []


@pytest.mark.parametrize(
    ("deltas", "items"),
    [
        ([text("\n"), call(0, "{}", "f"), text("\n")], [("call", "{}")]),
        ([thought("a"), text("\n\n"), text("b")], [("reasoning", "a"), ("text", "\n\nb")]),
        ([text(" "), text("a "), text(" b")], [("text", " a  b")]),
        ([text(" ")], [("text", " ")]),
        ([], [("text", "")]),
        ([thought("a")], [("reasoning", "a"), ("text", "")]),
    ],
)
def test_white_space_is_a_text_only_beside_other_text(
    deltas: list[Delta], items: list[tuple[str, str]]
) -> None:
    assert gathered(*deltas) == items


def test_log_probabilities_stay_with_their_text() -> None:
    first, second = TokenLogprob(" ", -1, b" "), TokenLogprob("a", -2, b"a")
    answer = AnswerItems()
    assert answer.add(text(" ", first)) == []
    opened, grew = answer.add(text("a", second))
    assert isinstance(opened, Opened) and isinstance(grew, Grew)
    assert grew.logprobs == (first, second) and opened.item.logprobs == [first, second]


def test_calls_out_of_order_are_a_fault_of_the_model() -> None:
    with pytest.raises(ModelError):
        AnswerItems().add(call(1, name="f"))
