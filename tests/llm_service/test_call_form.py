"""Both spellings of tools and calls, and InternLM's from its tokenizer to the answer's pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart
from llm_service.call_form import HERMES, INTERNLM, CallForm, find_call_form
from llm_service.choice import Choice
from llm_service.grammar import Grammar
from llm_service.grammar_compiler import grammar_vocabulary
from llm_service.messages import SequenceOutput, TokenOutput
from llm_service.response_format import grammar_text
from llm_service.sampling_params import SamplingParams
from llm_service.tokenizer import load_tokenizer
from llm_service.tools import Tool, ToolChoice, ToolUse
from tests.llm_service.vocabularies import SPECIAL, write_sentencepiece

LOOK = Tool("look", "Look at it", '{"type": "object", "additionalProperties": false}')


@pytest.mark.parametrize("form", [HERMES, INTERNLM], ids=["hermes", "internlm"])
def test_a_call_in_the_history_is_one_that_the_parser_reads(form: CallForm) -> None:
    parser = AnswerParser(reasoning=False, tools=True, form=form)
    pieces = parser.push(form.call_text("look", '{"at": "cat"}'))
    assert pieces == [CallStart(0, "look"), CallArguments(0, '{"at": "cat"}')]


def test_what_a_prompt_says_of_tools() -> None:
    said = HERMES.tools_text([LOOK.definition()])
    assert said.startswith("# Tools\n") and json.dumps(LOOK.definition()) in said
    assert json.loads(INTERNLM.tools_text([LOOK.definition()])) == [LOOK.definition()["function"]]


def test_the_tokenizer_tells_the_form() -> None:
    assert find_call_form(SPECIAL) is HERMES
    assert find_call_form([*SPECIAL, *INTERNLM.tokens]) is INTERNLM
    assert find_call_form(INTERNLM.tokens[:2]) is HERMES


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_internlms_markers_are_special_tokens_that_a_forced_call_has_and_no_answer_shows(
    tmp_path: Path, add_dummy_prefix: bool, seed: int
) -> None:
    folder = write_sentencepiece(tmp_path, add_dummy_prefix, [*SPECIAL, *INTERNLM.tokens])
    tokenizer = load_tokenizer(folder)
    vocabulary = grammar_vocabulary(tokenizer, tokenizer.vocab_size)
    rule = ToolUse((LOOK,), ToolChoice.REQUIRED, single_call=True).rule(False, INTERNLM)
    state = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary).start()
    words, choose = np.zeros(vocabulary.num_words, np.int32), random.Random(seed)
    parser = AnswerParser(reasoning=False, tools=True, form=INTERNLM)
    choice = Choice(0, SamplingParams(), frozenset(), tokenizer, parser)
    token_ids: list[int] = []
    while not state.is_complete:
        state.fill(words, (), may_end=True)
        assert not state.has_failed
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        token_ids.append(choose.choice(allowed))
        state.accept(token_ids[-1])
    tokens = [TokenOutput(token_id) for token_id in token_ids]
    choice.push(SequenceOutput(1, 0, tokens, "stop", 0, 0, 0))
    delta = choice.take_delta()
    start, plugin, end = (tokenizer.token_id(name) for name in INTERNLM.tokens)
    assert token_ids[:2] == [start, plugin] and token_ids[-1] == end
    assert delta is not None and delta.text == "" and delta.tool_calls[0] == CallStart(0, "look")
    written = "".join(piece.text for piece in delta.tool_calls if isinstance(piece, CallArguments))
    assert json.loads(written) == {}
    assert choice.finished is not None and choice.finished.reason == "tool_calls"
