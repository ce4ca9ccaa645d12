"""Tools in a prompt, and calls that must come."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart, Reasoning
from llm_service.call_form import HERMES, INTERNLM, CallForm
from llm_service.grammar import Grammar, GrammarVocabulary
from llm_service.response_format import grammar_text
from llm_service.tools import Tool, ToolChoice, ToolUse, with_thought
from protos.errors import InvalidRequest

LOOK = Tool(
    "look",
    "Look at it",
    json.dumps(
        {
            "type": "object",
            "properties": {"at": {"enum": ["cat", "dog"]}, "times": {"type": "integer", "maximum": 9}},
            "required": ["at", "times"],
            "additionalProperties": False,
        }
    ),
)
STOP = Tool("stop", "", "")


def written(rule: str, seed: int) -> str:
    """Random bytes that the grammar allows; the end as soon as it may be."""
    tokens = [bytes([b]) for b in range(256)] + [b""] * 4
    specials = {name: place for place, name in enumerate(INTERNLM.tokens, 257)}
    vocabulary = GrammarVocabulary(tokens, lambda t: list(t.encode()), specials)
    spelled = {place: name.encode() for name, place in specials.items()}
    state = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary).start()
    words, choose, text = np.zeros(vocabulary.num_words, np.int32), random.Random(seed), b""
    for _ in range(3000):
        state.fill(words, (256,), may_end=True)
        assert not state.has_failed
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        if 256 in allowed:
            return text.decode()
        token_id = choose.choice(allowed)
        text += spelled.get(token_id) or bytes([token_id])
        state.accept(token_id)
    raise AssertionError(text[-200:])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choice", [ToolChoice.REQUIRED, ToolChoice.NAMED])
@pytest.mark.parametrize("form", [HERMES, INTERNLM], ids=["hermes", "internlm"])
def test_a_forced_call_is_a_call_whose_arguments_fulfil_the_schema(
    seed: int, choice: ToolChoice, form: CallForm
) -> None:
    closed_stop = Tool("stop", "", '{"type": "object", "additionalProperties": false}')
    use = ToolUse((closed_stop, LOOK), choice, "look")
    parser = AnswerParser(reasoning=False, tools=True, form=form)
    pieces = parser.push(written(use.rule(False, form), seed)) + parser.finish()
    assert isinstance(pieces[0], CallStart) and {type(piece) for piece in pieces[1:]} == {CallArguments}
    if choice is ToolChoice.NAMED or pieces[0].name == "look":
        assert pieces[0].name == "look"
        arguments = json.loads("".join(getattr(piece, "text", "") for piece in pieces))
        jsonschema.validate(arguments, LOOK.schema())


def test_thoughts_may_come_before_what_is_forced() -> None:
    vocabulary = GrammarVocabulary([bytes([b]) for b in range(256)], lambda t: list(t.encode()))
    for rule in (ToolUse((STOP,), ToolChoice.REQUIRED).rule(True, HERMES), with_thought('"yes"', True)):
        grammar = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary)
        answer = "yes" if "yes" in rule else '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
        for text in (answer, f"<think>\nHm </x> \n</think>\n\n{answer}"):
            state = grammar.start()
            for byte in text.encode():
                state.accept(byte)
            assert state.is_complete, text
    parser = AnswerParser(reasoning=True, tools=False)
    assert parser.push("<think>a</think>\n\nyes")[0] == Reasoning("a")


def test_nothing_is_forced_otherwise() -> None:
    for use in (ToolUse((LOOK,)), ToolUse((LOOK,), ToolChoice.NONE)):
        assert use.rule(False, HERMES) == ""
    assert with_thought("x", False) == "x" and ToolUse((LOOK,), ToolChoice.NONE).shown == ()


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (ToolUse(()), "tools.tools"),
        (ToolUse((STOP,) * 129), "tools.tools"),
        (ToolUse((STOP,), allowed=("stop", "go")), "tools.allowed[1]"),
        (ToolUse((STOP,), ToolChoice.NAMED, "stop", allowed=("stop",)), "tools.allowed"),
        (ToolUse((STOP,), ToolChoice.NONE, allowed=("stop",)), "tools.allowed"),
        (ToolUse((STOP, STOP)), "tools.tools"),
        (ToolUse((Tool("a b", "", ""),)), "tools.tools[0].name"),
        (ToolUse((STOP, Tool("x", "", "{"))), "tools.tools[1].parameters"),
        (ToolUse((STOP, Tool("x", "", "[]"))), "tools.tools[1].parameters"),
        (ToolUse((STOP, Tool("x", "d" * 300_000, ""))), "tools.tools"),
        (ToolUse((STOP,), ToolChoice.NAMED, "look"), "tools.name"),
    ],
)
def test_wrong_tools_are_refused_by_name(use: ToolUse, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        use.validate()
    assert refused.value.field == field


def test_right_tools_are_not() -> None:
    ToolUse((LOOK, STOP), ToolChoice.NAMED, "stop").validate()


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (ToolUse((LOOK, STOP), ToolChoice.NAMED, "stop"), "tools.tools[1].parameters"),
        (ToolUse((LOOK, STOP), ToolChoice.REQUIRED, allowed=("stop",)), "tools.tools[1].parameters"),
        (ToolUse((LOOK, STOP), ToolChoice.REQUIRED), "tools.tools"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_named_where_there_is_one_only(use: ToolUse, field: str) -> None:
    assert use.refusal("is bad").field == field


def test_a_schema_with_what_json_cannot_say_is_that_of_its_tool() -> None:
    use = ToolUse((LOOK, Tool("x", "", '{"const": NaN}')), ToolChoice.REQUIRED)
    with pytest.raises(InvalidRequest) as refused:
        use.rule(False, HERMES)
    assert refused.value.field == "tools.tools[1].parameters"


def test_only_allowed_tools_are_shown_and_forced() -> None:
    use = ToolUse((STOP, LOOK), ToolChoice.REQUIRED, allowed=("look",))
    use.validate()
    assert use.shown == (LOOK,)
    for seed in range(5):
        assert '"look"' in written(use.rule(False, HERMES), seed)
    assert ToolUse((STOP, LOOK), allowed=("stop", "look")).shown == (STOP, LOOK)
