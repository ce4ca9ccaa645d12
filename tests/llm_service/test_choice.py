"""Tokens of one choice become deltas: nothing is lost, nothing shown twice, and it ends where it should.

About `include_stop_str_in_output` and stop tokens: as in vLLM, the flag keeps the text of a stop token too,
unless the token is special and special tokens are skipped.  The token is counted and reported either way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart
from llm_service.choice import Choice, ChoiceDelta, ChoiceFinished
from llm_service.messages import SequenceOutput, TokenOutput
from llm_service.sampling_params import SamplingParams
from llm_service.tokenizer import Tokenizer
from tests.llm_service.front_end import CHUNKS, EOS_ID, SPECIAL, make_tokenizer

TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    """One token a byte."""
    return TOKENIZER.encode_plain(text)


def token(text: bytes) -> int:
    return len(SPECIAL) + CHUNKS.index(text)


def step(token_ids: Iterable[int], finish: str | None = None, logprob: float | None = None) -> SequenceOutput:
    tokens = [TokenOutput(i, logprob, [(i, logprob), (0, -9.0)] if logprob else []) for i in token_ids]
    return SequenceOutput(0, 0, tokens, finish, 0, 1, 0)


def choice(stop_token_ids: Iterable[int] = (), **params: Any) -> Choice:
    return Choice(3, SamplingParams(**params), frozenset({EOS_ID, *stop_token_ids}), TOKENIZER)


def run(it: Choice, token_ids: list[int], finish: str | None = "stop") -> list[ChoiceDelta]:
    """One token a step; stops when the choice has."""
    deltas = []
    for position, token_id in enumerate(token_ids):
        it.push(step([token_id], finish if position == len(token_ids) - 1 else None))
        delta = it.take_delta()
        if delta is not None:
            deltas.append(delta)
        if it.finished is not None:
            break
    return deltas


def text_of(deltas: list[ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[ChoiceDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


class TestDeltas:
    def test_joined_they_are_the_whole_text_and_all_tokens(self) -> None:
        it = choice()
        tokens = [*ids("the caf\u00e9 is open."), EOS_ID]
        deltas = run(it, tokens)
        assert text_of(deltas) == "the caf\u00e9 is open."
        assert ids_of(deltas) == tokens
        assert {delta.index for delta in deltas} == {3}
        assert it.num_output_tokens == len(tokens)

    def test_half_a_character_waits_and_its_tokens_come_with_it(self) -> None:
        it = choice()
        deltas = run(it, ids("a\u00e9"), "length")
        assert [(delta.text, len(delta.token_ids)) for delta in deltas] == [("a", 1), ("\u00e9", 2)]

    def test_tokens_without_text_come_with_the_next_text_or_at_the_end(self) -> None:
        it = choice()
        deltas = run(it, [0, *ids("a"), 0, EOS_ID])
        assert [(delta.text, delta.token_ids) for delta in deltas] == [
            ("a", [0, *ids("a")]),
            ("", [0, EOS_ID]),
        ]

    def test_an_unfinished_character_at_the_end_is_replaced(self) -> None:
        deltas = run(choice(), [*ids("a"), token(b"\xc3")], "length")
        assert text_of(deltas) == "a\ufffd"

    def test_nothing_is_left_after_the_end(self) -> None:
        it = choice()
        run(it, [*ids("ab"), EOS_ID])
        assert it.take_delta() is None
        it.push(step(ids("c")))
        assert it.take_delta() is None and it.num_output_tokens == 3

    def test_what_was_not_taken_is_joined(self) -> None:
        it = choice()
        for token_id in ids("abc"):
            it.push(step([token_id]))
        assert it.take_delta() == ChoiceDelta(3, "abc", ids("abc"), [])

    @pytest.mark.parametrize("finish", ["stop", "length"])
    def test_several_tokens_in_one_step_all_count(self, finish: str) -> None:
        """The reason belongs to the last of them."""
        it = choice(stop_token_ids=ids("a"))
        tokens = [*ids("ban"), *(ids("a") if finish == "stop" else ids("c"))]
        it.push(step(tokens, finish))
        delta = it.take_delta()
        assert delta is not None and delta.token_ids == tokens
        assert delta.text == ("ban" if finish == "stop" else "banc")
        assert it.finished is not None and it.finished.reason == finish


class TestStopStrings:
    @pytest.mark.parametrize("cuts", list(itertools.product([False, True], repeat=6)))
    def test_are_found_however_the_tokens_come_in_steps(self, cuts: tuple[bool, ...]) -> None:
        it = choice(stop=("nan", "zz"))
        group: list[int] = []
        text = ""
        for token_id, cut in zip(ids("banana"), cuts, strict=True):
            group.append(token_id)
            if cut:
                it.push(step(group))
                group = []
                delta = it.take_delta()
                text += delta.text if delta else ""
        it.push(step(group))
        delta = it.take_delta()
        assert text + (delta.text if delta else "") == "ba"
        assert it.finished == ChoiceFinished(3, "stop", "nan", None)
        assert it.stopped_by_string and it.num_output_tokens == 5

    def test_text_that_may_become_one_is_held_back_with_its_tokens(self) -> None:
        it = choice(stop=("nan",))
        deltas = run(it, ids("banter"), "length")
        assert [(delta.text, len(delta.token_ids)) for delta in deltas] == [
            ("b", 1),
            ("a", 1),
            ("nt", 2),
            ("e", 1),
            ("r", 1),
        ]

    def test_included_when_asked_for(self) -> None:
        it = choice(stop=("nan",), include_stop_str_in_output=True)
        assert text_of(run(it, ids("banana"), "length")) == "banan"
        assert it.finished is not None and it.finished.stop_string == "nan"

    def test_one_that_begins_inside_a_token_cuts_it(self) -> None:
        it = choice(stop=("h",))
        assert text_of(run(it, [*ids("a"), token(b"th")], None)) == "at"
        assert it.finished is not None

    def test_one_that_completes_with_the_last_token_wins_over_length(self) -> None:
        it = choice(stop=("nan",))
        run(it, ids("banan"), "length")
        assert it.finished == ChoiceFinished(3, "stop", "nan", None)

    def test_text_held_back_is_shown_at_the_end(self) -> None:
        it = choice(stop=("nan",))
        assert text_of(run(it, ids("bana"), "length")) == "bana"
        it = choice(stop=("nan",))
        assert text_of(run(it, [*ids("bana"), EOS_ID])) == "bana"

    def test_not_before_min_tokens(self) -> None:
        it = choice(stop=("a",), min_tokens=3)
        assert text_of(run(it, ids("banana"), "length")) == "ban"
        assert it.num_output_tokens == 4


class TestStopTokens:
    def test_the_end_token_is_counted_and_reported_but_not_shown(self) -> None:
        for skip in (True, False):
            it = choice(skip_special_tokens=skip)
            deltas = run(it, [*ids("ab"), EOS_ID])
            assert text_of(deltas) == "ab" and ids_of(deltas)[-1] == EOS_ID
            assert it.finished == ChoiceFinished(3, "stop", None, EOS_ID)
            assert it.num_output_tokens == 3

    def test_an_ordinary_stop_token_is_not_in_the_text(self) -> None:
        stop = token(b"th")
        it = choice(stop_token_ids=[stop])
        assert text_of(run(it, [*ids("ab"), stop])) == "ab"
        assert it.finished == ChoiceFinished(3, "stop", None, stop)

    def test_unless_stops_are_to_be_included(self) -> None:
        stop = token(b"th")
        it = choice(stop_token_ids=[stop], include_stop_str_in_output=True)
        assert text_of(run(it, [*ids("ab"), stop])) == "abth"
        assert it.finished == ChoiceFinished(3, "stop", None, stop)
        assert it.num_output_tokens == 3

    @pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "ab<|im_end|>")])
    def test_an_included_end_token_shows_where_special_tokens_do(self, skip: bool, text: str) -> None:
        it = choice(include_stop_str_in_output=True, skip_special_tokens=skip)
        assert text_of(run(it, [*ids("ab"), EOS_ID])) == text

    def test_one_that_did_not_end_the_choice_is_ordinary_text(self) -> None:
        """Before min_tokens, or with max_tokens reached at the same token."""
        stop = token(b"th")
        it = choice(stop_token_ids=[stop])
        assert text_of(run(it, [stop, *ids("a")], "length")) == "tha"
        assert it.finished == ChoiceFinished(3, "length", None, None)


class TestLogprobs:
    def test_follow_their_tokens(self) -> None:
        it = choice(stop=("zz",), logprobs=1)
        tokens = [*ids("a\u00e9z"), *ids("b"), EOS_ID]
        deltas = []
        for position, token_id in enumerate(tokens):
            finish = "stop" if token_id == EOS_ID else None
            it.push(step([token_id], finish, logprob=-0.5 * (position + 1)))
            delta = it.take_delta()
            if delta is not None:
                deltas.append(delta)
        for delta in deltas:
            assert [item.token.token_id for item in delta.logprobs] == delta.token_ids
        flat = [item for delta in deltas for item in delta.logprobs]
        assert [item.token.logprob for item in flat] == [-0.5 * n for n in range(1, 7)]
        assert b"".join(item.token.raw for item in flat[:-1]).decode() == "a\u00e9zb"
        assert flat[1].token.text == "\ufffd"
        assert [(top.token_id, top.logprob) for top in flat[0].top] == [(ids("a")[0], -0.5), (0, -9.0)]
        assert flat[0].top[1].text == "<|endoftext|>"

    def test_there_are_none_unless_asked_for(self) -> None:
        assert run(choice(), ids("a"), "length")[0].logprobs == []


class Spelled:
    """A vocabulary of bytes, for markers that letters cannot spell."""

    strips_leading_space = False
    vocab_size = 256

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return list(text.encode())

    def piece_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


class TestParsedAnswers:
    def run(self, text: str, finish: str = "stop", **params: Any) -> tuple[Choice, list[ChoiceDelta]]:
        tokenizer = Tokenizer(Spelled(), {}, [], {})
        parser = AnswerParser(reasoning=True, tools=True)
        it = Choice(0, SamplingParams(**params), frozenset(), tokenizer, parser)
        return it, run(it, list(text.encode()), finish)

    def test_each_part_comes_in_its_own_field_and_no_token_is_lost(self) -> None:
        text = '<think>hm</think>\n\nSo: <tool_call>{"name": "f", "arguments": {"é": 1}}</tool_call>'
        it, deltas = self.run(text)
        assert "".join(delta.reasoning for delta in deltas) == "hm" and text_of(deltas) == "So: "
        pieces = [piece for delta in deltas for piece in delta.tool_calls]
        assert pieces[0] == CallStart(0, "f")
        assert "".join(piece.text for piece in pieces[1:] if isinstance(piece, CallArguments)) == '{"é": 1}'
        assert ids_of(deltas) == list(text.encode())
        assert it.finished is not None and it.finished.reason == "tool_calls"

    def test_a_call_that_is_cut_off_ends_for_length(self) -> None:
        it, deltas = self.run('<tool_call>{"name": "f", "arguments": {"a', finish="length")
        assert it.finished is not None and it.finished.reason == "length"
        assert [piece for delta in deltas for piece in delta.tool_calls][0] == CallStart(0, "f")

    def test_what_was_held_back_is_shown_when_a_stop_string_ends_it(self) -> None:
        it, deltas = self.run("a <tool_END", stop=("END",))
        assert text_of(deltas) == "a <tool_" and it.finished is not None and it.finished.reason == "stop"
