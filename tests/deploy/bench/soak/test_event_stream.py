from __future__ import annotations

import json

import pytest

from deploy.bench.soak.event_stream import EventStream
from deploy.bench.soak.unexpected import Unexpected

DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'


def chunk(text: str, index: int = 0, finish_reason: str | None = None) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_pieces_of_any_size_make_the_texts() -> None:
    whole = (
        chunk("two ")
        + b": keepalive\n\n"
        + chunk("x", 1, "stop")
        + chunk("words", 0, "length")
        + USAGE
        + DONE
    )
    for size in (1, 7, 1000):
        stream = EventStream()
        for start in range(0, len(whole), size):
            stream.feed(whole[start : start + size])
        stream.check_end(2)
        assert stream.texts == {0: "two words", 1: "x"}
        assert stream.finish_reasons == {0: "length", 1: "stop"}


def test_an_error_in_the_stream_is_unexpected() -> None:
    with pytest.raises(Unexpected, match="broken"):
        EventStream().feed(b'data: {"error": {"message": "broken"}}\n\n')


@pytest.mark.parametrize(
    "data",
    [
        chunk("a") + USAGE + DONE,  # no finish_reason
        chunk("a", 0, "stop") + DONE,  # no usage
        chunk("a", 0, "stop") + USAGE,  # cut
        chunk("a", 0, "stop") + USAGE + DONE + b"data: x",
        chunk("a", 1, "stop") + USAGE + DONE,  # another choice than asked for
    ],
)
def test_an_end_too_early_is_unexpected(data: bytes) -> None:
    stream = EventStream()
    stream.feed(data)
    with pytest.raises(Unexpected):
        stream.check_end(1)


def test_a_choice_ends_once() -> None:
    with pytest.raises(Unexpected, match="behind its end"):
        EventStream().feed(chunk("a", 0, "stop") + chunk("b", 0, "stop"))


def test_nothing_comes_behind_done() -> None:
    with pytest.raises(Unexpected, match="out of place"):
        EventStream().feed(DONE + chunk("a"))
