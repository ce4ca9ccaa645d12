"""An answer is understood however its bytes are cut, and nothing but text counts as text."""

from __future__ import annotations

import json

import pytest

from deploy.bench.answer import Answer, AnswerError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def event(delta: dict[str, object] | None, **more: object) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    return b"data: " + json.dumps({"choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


EVENTS = [
    event({"role": "assistant", "content": ""}),
    event({"content": "a"}, usage=None),
    b": keepalive\n\n",
    event({"content": '"content":"'}),
    event({"content": None, "reasoning_content": "b"}),
    event({}),
    event(None, usage=USAGE),
    b"data: [DONE]\n\n",
]
WHOLE = HEAD + b"".join(map(chunk, EVENTS)) + chunk(b"")


def feed_in_pieces(data: bytes, size: int) -> Answer:
    answer = Answer()
    ends = [answer.feed(data[at : at + size], float(at)) for at in range(0, len(data), size)]
    assert ends == [False] * (len(ends) - 1) + [True]
    return answer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_pieces_of_any_size_give_the_same_answer(size: int) -> None:
    answer = feed_in_pieces(WHOLE, size)
    assert (answer.num_texts, answer.usage) == (3, USAGE)


def test_times_are_those_of_the_first_and_the_last_text() -> None:
    answer = Answer()
    answer.feed(HEAD, 0.5)
    for moment, data in enumerate(EVENTS, start=1):
        assert not answer.feed(chunk(data), float(moment))
    assert answer.feed(chunk(b""), 99.0)
    assert (answer.first_text_at, answer.last_text_at) == (2.0, 5.0)


def test_an_event_may_be_cut_by_chunks() -> None:
    data = b"".join(EVENTS)
    body = b"".join(chunk(data[at : at + 5]) for at in range(0, len(data), 5))
    answer = feed_in_pieces(HEAD + body + chunk(b""), 11)
    assert (answer.num_texts, answer.usage) == (3, USAGE)


def test_json_with_spaces_is_understood() -> None:
    data = b'data: {"choices": [{"delta": {"content": "x"}}], "usage": null}\n\n'
    assert feed_in_pieces(HEAD + chunk(data) + chunk(b""), 1000).num_texts == 1


def test_a_refusal_is_raised_with_its_status_and_text() -> None:
    answer = Answer()
    assert not answer.feed(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 8\r\n\r\nqueue", 0.0)
    with pytest.raises(AnswerError, match="^429 queue is$"):
        answer.feed(b" is", 0.0)


def test_an_error_among_the_events_is_raised() -> None:
    data = event(None, error={"message": "the engine has ended"})
    with pytest.raises(AnswerError, match="the engine has ended"):
        Answer().feed(HEAD + chunk(data), 0.0)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    answer = Answer()
    assert not answer.feed(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(EVENTS), 0.0)
    assert answer.end() and answer.num_texts == 3
    broken = Answer()
    broken.feed(HEAD + chunk(EVENTS[1]), 0.0)
    assert not broken.end()
