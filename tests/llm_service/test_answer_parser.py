"""Reasoning, content and calls out of text, however it is cut."""

from __future__ import annotations

import json
import random

import pytest

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart, Content, Reasoning
from llm_service.call_form import INTERNLM


def parse(text: str, cuts: list[int], **options: object) -> dict[str, object]:
    """Everything joined, for comparison."""
    options = {"reasoning": True, "tools": True, **options}
    parser = AnswerParser(**options)  # type: ignore[arg-type]
    pieces, start = [], 0
    for end in [*cuts, len(text)]:
        pieces += parser.push(text[start:end])
        start = end
    pieces += parser.finish()
    assert all(getattr(piece, "text", "x") for piece in pieces), "an empty piece"
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.text
    return {
        "reasoning": "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "content": "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        "calls": calls,
    }


def whole(text: str, **options: object) -> dict[str, object]:
    """However the text is cut, the pieces are the same."""
    expected = parse(text, [], **options)
    assert parse(text, list(range(1, len(text))), **options) == expected
    for seed in range(20):
        choose = random.Random(seed)
        cuts = sorted(choose.sample(range(len(text) + 1), min(len(text), 4)))
        assert parse(text, cuts, **options) == expected, cuts
    return expected


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"}\\" [x]", "n": [1, {"k": 2}]}}\n</tool_call>'


def test_a_call_with_words_before_it() -> None:
    found = whole("Let me see. " + CALL)
    assert found["content"] == "Let me see. "
    (call,) = found["calls"]  # type: ignore[misc]
    assert call[0] == "look" and json.loads(call[1]) == {"at": 'a "}" [x]', "n": [1, {"k": 2}]}


def test_arguments_come_while_they_are_written() -> None:
    parser = AnswerParser(reasoning=False, tools=True)
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a"') == [
        CallStart(0, "f"),
        CallArguments(0, '{"a"'),
    ]
    assert parser.push(": 1}}</tool") == [CallArguments(0, ": 1}")]
    assert parser.push("_call>") == [] and parser.num_calls == 1


def test_several_calls_and_no_more_than_allowed() -> None:
    calls = "\n".join(CALL.replace("look", name) for name in ("one", "two", "three"))
    assert [name for name, _ in whole(calls)["calls"]] == ["one", "two", "three"]  # type: ignore[attr-defined]
    assert [name for name, _ in whole(calls, max_calls=1)["calls"]] == ["one"]  # type: ignore[attr-defined]
    assert whole(calls)["content"] == ""


@pytest.mark.parametrize(
    "body", ['{"arguments": {"a": 1}, "name": "f"}', '{"name": "f", "parameters": {"a": 1}}']
)
def test_other_spellings_of_a_call(body: str) -> None:
    assert whole(f"<tool_call>{body}</tool_call>")["calls"] == [["f", '{"a": 1}']]


@pytest.mark.parametrize("body", ["not JSON", "[]", '{"name": 3}', '{"nam'])
def test_what_is_no_call_stays_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call> and on"
    found = whole(text)
    assert found["calls"] == [] and str(found["content"]).startswith(f"<tool_call>{body}</tool_call>")
    assert whole(f"a <tool_call>{body}")["content"] == f"a <tool_call>{body}"


def test_reasoning_comes_first_and_only_there() -> None:
    found = whole("<think>\nHm, <b>.\n</think>\n\nYes. <think>no</think>")
    assert found == {"reasoning": "Hm, <b>.\n", "content": "Yes. <think>no</think>", "calls": []}
    assert whole("No <think>x</think>")["reasoning"] == ""
    assert whole("<thin")["content"] == "<thin"


def test_reasoning_that_the_prompt_has_opened_or_that_never_ends() -> None:
    assert whole("Hm.</think>Yes.", in_reasoning=True) == {"reasoning": "Hm.", "content": "Yes.", "calls": []}
    assert whole("<think>Hm. </thi") == {"reasoning": "Hm. </thi", "content": "", "calls": []}


def test_a_call_inside_reasoning_is_reasoning() -> None:
    found = whole(f"<think>{CALL}</think>{CALL}")
    assert len(found["calls"]) == 1 and found["reasoning"] == CALL  # type: ignore[arg-type]


def test_without_tools_and_reasoning_everything_is_content() -> None:
    text = f"<think>a</think>{CALL}"
    assert whole(text, reasoning=False, tools=False)["content"] == text


@pytest.mark.parametrize("name", ["look", "other"])
def test_what_calls_a_tool_that_is_not_allowed_stays_text(name: str) -> None:
    allowed = {"look", "see"}
    for call in (CALL, '<tool_call>{"arguments": {"a": 1}, "name": "look"}</tool_call>'):
        found = whole(call.replace("look", name), names=allowed)
        is_call = name in allowed
        assert (len(found["calls"]) == 1, found["content"] == "") == (is_call, is_call)  # type: ignore[arg-type]


def test_internlms_calls() -> None:
    call = '<|action_start|><|plugin|>\n{"name": "look", "parameters": {"at": "x"}}<|action_end|>'
    found = whole(f"Let me see.{call}", form=INTERNLM)
    assert found == {"reasoning": "", "content": "Let me see.", "calls": [["look", '{"at": "x"}']]}
    assert len(whole(call + call, form=INTERNLM)["calls"]) == 2  # type: ignore[arg-type]
    assert whole(CALL, form=INTERNLM)["content"] == CALL
