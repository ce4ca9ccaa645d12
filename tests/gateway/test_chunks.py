"""What chunks of a stream say event by event; whole streams are in test_chat.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.chunks import ChunkEncoder
from gateway.completion import Reply
from gateway.events import (
    CallDelta,
    Delta,
    Event,
    Finished,
    Part,
    Restarted,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from protos.errors import ModelError


def encoder_of(num_choices: int = 1, *, logprobs: bool = False, **options: bool) -> ChunkEncoder:
    return ChunkEncoder(Reply("chatcmpl-1", 5, "m", num_choices, logprobs), **options)


def chunks_of(encoder: ChunkEncoder, *events: Event) -> list[Any]:
    text = b"".join(map(encoder.encode, events)).decode("ascii")
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]


def test_a_delta_without_text_says_nothing_but_its_tokens_count() -> None:
    encoder = encoder_of(include_usage=True, usage_in_chunks=True)
    assert chunks_of(encoder, Started(7), Delta(0, "", 2)) == []
    *_, chunk = chunks_of(encoder, Delta(0, "a", 1))
    assert (chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) == (7, 3)


def test_logprobs_of_a_delta_without_text_are_said() -> None:
    token = TokenLogprob("", -0.5, b"\xf0")
    _, chunk = chunks_of(encoder_of(logprobs=True), Delta(0, "", 1, (token,)))
    (choice,) = chunk["choices"]
    assert choice["delta"] == {"content": ""}
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0xF0]]


def deltas_of(encoder: ChunkEncoder, *events: Event) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks_of(encoder, *events)]


def test_a_call_says_its_id_type_and_name_once() -> None:
    calls = [CallDelta(0, "", "look"), CallDelta(0, '{"at":'), CallDelta(0, "1}"), CallDelta(1, "{}", "stop")]
    role, *deltas = deltas_of(encoder_of(), *(Delta(0, "", 1, calls=(call,)) for call in calls))
    assert role == {"role": "assistant", "content": ""}
    first, second, third, other = [delta["tool_calls"][0] for delta in deltas]
    assert first.pop("id") != other.pop("id")
    assert first == {"index": 0, "type": "function", "function": {"name": "look", "arguments": ""}}
    assert second == {"index": 0, "function": {"arguments": '{"at":'}}
    assert third == {"index": 0, "function": {"arguments": "1}"}}
    assert other == {"index": 1, "type": "function", "function": {"name": "stop", "arguments": "{}"}}


def test_choices_number_their_calls_each_for_itself() -> None:
    deltas = [Delta(index, "", 1, calls=(CallDelta(0, "{}", "look"),)) for index in (1, 0)]
    calls = [delta["tool_calls"][0] for delta in deltas_of(encoder_of(2), *deltas) if "tool_calls" in delta]
    assert [call["index"] for call in calls] == [0, 0] and calls[0]["id"] != calls[1]["id"]


def test_what_came_together_is_said_in_its_order_and_logprobs_once() -> None:
    token = TokenLogprob("x", -0.5, b"x")
    delta = Delta(0, "猫", 3, (token,), "hm\n", (CallDelta(0, "{}", "look"),))
    _, *chunks = chunks_of(encoder_of(logprobs=True), delta, Finished(0, "tool_calls"))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [list(choice["delta"]) for choice in choices] == [
        ["reasoning_content"],
        ["content"],
        ["tool_calls"],
        [],
    ]
    assert choices[0]["delta"]["reasoning_content"] == "hm\n" and choices[1]["delta"]["content"] == "猫"
    assert [choice["logprobs"] is not None for choice in choices] == [True, False, False, False]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_choice_that_ends_without_text_still_has_a_role() -> None:
    role, end = chunks_of(encoder_of(), Finished(0, "length"))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_every_choice_gets_its_role_once_however_deltas_interleave() -> None:
    deltas = [Delta(index, text, 1) for index, text in [(1, "a"), (0, "b"), (1, "c"), (0, "d")]]
    chunks = chunks_of(encoder_of(2), *deltas)
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]["content"]) for c in chunks] == [
        (1, ""),
        (1, "a"),
        (0, ""),
        (0, "b"),
        (1, "c"),
        (0, "d"),
    ]
    assert ["role" in c["choices"][0]["delta"] for c in chunks] == [True, False, True, False, False, False]


@pytest.mark.parametrize("text", ["a\nb\r\n\nc", "\u2028\u2029\x85", "猫 🐈", 'say "data: [DONE]"\\', "\x00"])
def test_no_text_can_break_the_line_that_carries_it(text: str) -> None:
    encoder = encoder_of()
    encoder.encode(Delta(0, "role first", 1))
    data = encoder.encode(Delta(0, text, 1))
    assert len(data.decode().splitlines()) == 2  # the event and the empty line after it
    assert json.loads(data.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == text


def test_counts_in_every_chunk_need_the_usage_that_was_asked_for() -> None:
    (_, chunk) = chunks_of(encoder_of(usage_in_chunks=True), Delta(0, "a", 1))
    assert "usage" not in chunk
    (_, chunk) = chunks_of(encoder_of(include_usage=True), Delta(0, "a", 1))
    assert chunk["usage"] is None


def test_a_stream_ends_only_after_all_choices_and_the_usage() -> None:
    encoder = encoder_of(2)
    for event in (Finished(0, "stop"), Usage(7, 0)):
        encoder.encode(event)
        with pytest.raises(ModelError):
            encoder.end()
    encoder.encode(Finished(1, "stop"))
    assert encoder.end() == b"data: [DONE]\n\n"


MEDIA = ((Part(640, 480, 4, 3, True, 13),), (Part(64, 48, 1, 1, False, 1, 0.5),))


def test_details_are_said_to_those_who_ask() -> None:
    encoder = encoder_of(include_usage=True, details=True)
    events = (Started(7, MEDIA), Delta(0, "a", 1), Finished(0, "stop"))
    first, *_ = chunks_of(encoder, *events)
    (last,) = chunks_of(encoder, Usage(7, 1, timings=Timings(1, 2, 3, 4, 5, 6.00049)))
    assert first["choices"] == [] and first["usage"] is None
    picture, clip = first["details"]["media"]
    assert picture == [
        {
            "width": 640,
            "height": 480,
            "columns": 4,
            "rows": 3,
            "thumbnail": True,
            "tiles": 13,
            "timestamp_s": 0,
        }
    ]
    assert clip[0]["timestamp_s"] == 0.5
    names = ("layout", "encode", "queue", "prefill", "decode", "total")
    assert last["details"] == {"timings_ms": dict(zip(names, (1, 2, 3, 4, 5, 6), strict=True))}


def test_an_answer_begun_anew_shows_its_media_once() -> None:
    events = (Started(7, MEDIA), Restarted(), Started(7, MEDIA), Delta(0, "a", 1))
    assert ["details" in chunk for chunk in chunks_of(encoder_of(details=True), *events)] == [
        True,
        False,
        False,
    ]


def test_others_get_no_details() -> None:
    events = (Started(7, MEDIA), Delta(0, "a", 1), Usage(7, 1, timings=Timings(1, 2, 3, 4, 5, 6)))
    assert not [c for c in chunks_of(encoder_of(include_usage=True), *events) if "details" in c]
