"""Tools in a prompt, and calls that must come."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart, Reasoning
from llm_service.grammar import Grammar, GrammarVocabulary
from llm_service.response_format import grammar_text
from llm_service.tools import Tool, ToolChoice, ToolUse, call_text, tools_prompt, with_thought
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
    vocabulary = GrammarVocabulary([bytes([b]) for b in range(256)] + [b""], lambda t: list(t.encode()))
    state = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary).start()
    words, choose, text = np.zeros(vocabulary.num_words, np.int32), random.Random(seed), b""
    for _ in range(3000):
        state.fill(words, (256,), may_end=True)
        assert not state.has_failed
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        if 256 in allowed:
            return text.decode()
        token_id = choose.choice(allowed)
        text += bytes([token_id])
        state.accept(token_id)
    raise AssertionError(text[-200:])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choice", [ToolChoice.REQUIRED, ToolChoice.NAMED])
def test_a_forced_call_is_a_call_whose_arguments_fulfil_the_schema(seed: int, choice: ToolChoice) -> None:
    closed_stop = Tool("stop", "", '{"type": "object", "additionalProperties": false}')
    use = ToolUse((closed_stop, LOOK), choice, "look")
    parser = AnswerParser(reasoning=False, tools=True)
    pieces = parser.push(written(use.rule(may_think=False), seed)) + parser.finish()
    assert isinstance(pieces[0], CallStart) and {type(piece) for piece in pieces[1:]} == {CallArguments}
    if choice is ToolChoice.NAMED or pieces[0].name == "look":
        assert pieces[0].name == "look"
        arguments = json.loads("".join(getattr(piece, "text", "") for piece in pieces))
        jsonschema.validate(arguments, LOOK.schema())


def test_thoughts_may_come_before_what_is_forced() -> None:
    vocabulary = GrammarVocabulary([bytes([b]) for b in range(256)], lambda t: list(t.encode()))
    for rule in (ToolUse((STOP,), ToolChoice.REQUIRED).rule(True), with_thought('"yes"', True)):
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
    assert ToolUse((LOOK,)).rule(False) == "" == ToolUse((LOOK,), ToolChoice.NONE).rule(False)
    assert with_thought("x", False) == "x" and ToolUse((LOOK,), ToolChoice.NONE).shown == ()


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (ToolUse(()), "tools.tools"),
        (ToolUse((STOP,) * 129), "tools.tools"),
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


def test_the_prompt_says_how_to_call_as_the_parser_reads_it() -> None:
    prompt = tools_prompt([json.dumps(LOOK.definition())])
    assert '"name": "look"' in prompt and prompt.startswith("# Tools\n")
    parser = AnswerParser(reasoning=False, tools=True)
    pieces = parser.push(call_text("look", '{"at": "cat"}'))
    assert pieces == [CallStart(0, "look"), CallArguments(0, '{"at": "cat"}')]
