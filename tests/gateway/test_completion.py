"""How the events of an answer add up to one body; bodies over HTTP are in test_chat.py."""

from __future__ import annotations

import json
import math

import pytest

from gateway.completion import MIN_LOGPROB, Completion, Reply, logprobs_json, usage_json
from gateway.events import CallDelta, Delta, Event, Finished, Started, TokenLogprob, Usage
from protos.errors import ModelError


def completion_of(*events: Event, num_choices: int = 1, logprobs: bool = False) -> Completion:
    completion = Completion(Reply("chatcmpl-1", 5, "m", num_choices, logprobs))
    for event in events:
        completion.add(event)
    return completion


def test_interleaved_choices_are_sorted_out() -> None:
    deltas = [Delta(index, text, 1) for index, text in [(1, "c"), (0, "a"), (1, "d"), (0, "b")]]
    ends = [Finished(1, "length"), Finished(0, "stop"), Usage(7, 4)]
    choices = completion_of(Started(7), *deltas, *ends, num_choices=2).body()["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "ab", "stop"),
        (1, "cd", "length"),
    ]


def test_a_choice_without_text_is_an_empty_string_and_not_null() -> None:
    (choice,) = completion_of(Finished(0, "stop"), Usage(7, 0)).body()["choices"]
    assert choice["message"]["content"] == ""


def test_calls_without_a_text_have_no_content() -> None:
    deltas = [
        Delta(0, "", 1, calls=(CallDelta(0, '{"at"', "look"),)),
        Delta(0, "", 1, calls=(CallDelta(0, ":1}"),)),
    ]
    (choice,) = completion_of(*deltas, Finished(0, "tool_calls"), Usage(7, 2)).body()["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls" and call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}


def test_thoughts_stand_beside_the_text_and_calls_behind_it() -> None:
    deltas = [Delta(0, "", 1, reasoning="a"), Delta(0, "yes", 1, (), "b", (CallDelta(0, "{}", "look"),))]
    (choice,) = completion_of(*deltas, Finished(0, "tool_calls"), Usage(7, 2)).body()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("ab", "yes")
    assert len(message["tool_calls"]) == 1


def test_what_a_model_did_not_do_has_no_key() -> None:
    (choice,) = completion_of(Delta(0, "a", 1), Finished(0, "stop"), Usage(7, 1)).body()["choices"]
    assert set(choice["message"]) == {"role", "content", "refusal"}


def test_one_unfinished_choice_of_two_is_an_error() -> None:
    with pytest.raises(ModelError):
        completion_of(Delta(1, "a", 1), Finished(0, "stop"), Usage(7, 1), num_choices=2).body()


@pytest.mark.parametrize("asked", [False, True])
def test_logprobs_are_said_only_when_asked_for(asked: bool) -> None:
    events = (Delta(0, "a", 1, (TokenLogprob("a", -1.0, b"a"),)), Finished(0, "stop"), Usage(7, 1))
    (choice,) = completion_of(*events, logprobs=asked).body()["choices"]
    assert (choice["logprobs"] is not None) == asked


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e30])
def test_logprobs_that_json_lacks_become_the_least_one(logprob: float) -> None:
    token = TokenLogprob("a", logprob, b"a", top=(TokenLogprob("b", logprob, b"b"),))
    (entry,) = json.loads(json.dumps(logprobs_json((token,)), allow_nan=False))
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == MIN_LOGPROB


def test_a_token_that_is_part_of_a_character_has_its_bytes() -> None:
    first, second = logprobs_json((TokenLogprob("�", -1, b"\xc3"), TokenLogprob("�", -2, b"\xa9")))
    assert bytes(first["bytes"] + second["bytes"]).decode() == "é"


def test_cached_and_picture_tokens_are_part_of_the_prompt_and_not_added() -> None:
    usage = usage_json(Usage(100, 5, cached_tokens=60, image_tokens=30))
    assert usage["total_tokens"] == 105
    assert usage["prompt_tokens_details"] == {"cached_tokens": 60, "image_tokens": 30}
