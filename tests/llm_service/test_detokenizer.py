"""Deltas joined equal the whole decoding; stop strings cut at the same place however tokens arrive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_service.detokenizer import IncrementalDetokenizer
from llm_service.tokenizer import Tokenizer, load_tokenizer
from llm_service.vocabulary import AddedToken
from tests.llm_service.vocabularies import write_byte_level, write_sentencepiece

STRINGS = [
    "plain ascii text",
    "猫と犬 你好，世界。",
    "family 👩‍👩‍👧‍👦 flag 🏳️‍🌈 skin 👍🏽",
    "combining e\u0301 a\u0323\u0302 ক্ষি नमस्ते",
    " leading space\n\n\ttab",
    "\U00010348 \u0000 \ufffd",
]


class ByteChunks:
    """A vocabulary of given byte strings: token i is chunk i."""

    strips_leading_space = False

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self._chunks = chunks
        self.vocab_size = len(chunks)

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return [self._chunks.index(text.encode())]

    def piece_bytes(self, token_id: int) -> bytes:
        return self._chunks[token_id]


def chunk_tokenizer(chunks: Sequence[bytes]) -> Tokenizer:
    return Tokenizer(ByteChunks(chunks), {len(chunks): AddedToken("<|im_end|>", True)}, [], {})


def random_cuts(data: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, len(data))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.fixture(scope="module", params=["byte_level", "dummy_prefix", "no_dummy_prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        return load_tokenizer(write_byte_level(folder))
    return load_tokenizer(write_sentencepiece(folder, request.param == "dummy_prefix"))


def test_any_split_of_the_bytes_gives_the_text_in_whole_characters() -> None:
    rng = random.Random(0)
    for round_number in range(400):
        string = rng.choice(STRINGS)
        chunks = random_cuts(string.encode(), rng)
        detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks))
        deltas = [detokenizer.push([i]) for i in range(len(chunks))]
        seen = 0
        for delta, end in zip(deltas, range(1, len(chunks) + 1), strict=True):
            seen += len(delta)
            certain = b"".join(chunks[:end]).decode("utf-8", "ignore")
            assert "".join(deltas)[:seen] == certain, round_number
        assert "".join(deltas) == string and detokenizer.finish() == ""


def test_random_ids_give_what_decode_gives(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for skip in (True, False):
        for _ in range(200):
            ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randint(0, 30))]
            detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            text = "".join(detokenizer.push([token_id]) for token_id in ids)
            assert text + detokenizer.finish() == tokenizer.decode(ids, skip)
            assert detokenizer.num_output_tokens == len(ids) and detokenizer.stopped is None


def test_real_texts_survive_any_grouping_of_their_tokens(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for string in STRINGS:
        ids = tokenizer.encode_plain(string)
        detokenizer = IncrementalDetokenizer(tokenizer)
        text = ""
        while ids:
            count = rng.randint(1, 4)
            text += detokenizer.push(ids[:count])
            ids = ids[count:]
        assert text + detokenizer.finish() == tokenizer.decode(tokenizer.encode_plain(string))


def test_bytes_that_are_no_text_become_replacement_characters_once_certain() -> None:
    chunks = [b"a\xe4", b"\xbd", b"b", b"\xf0\x9f"]
    detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks))
    assert [detokenizer.push([i]) for i in range(4)] == ["a", "", "\ufffdb", ""]
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["END", "\n\n", "结束", "👍🏽", "a", "aab"])
def test_a_stop_string_is_found_at_every_split(stop: str, include: bool) -> None:
    rng = random.Random(3)
    head, tail = "猫 E EN enD aa\n👍 结 text-", " tail END aab"
    if stop == "a":
        head = "猫 E EN\n👍 结 text-"
    string = head + stop + tail
    for _ in range(150):
        chunks = random_cuts(string.encode(), rng)
        detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks), [stop], include_stop_str=include)
        text = "".join(detokenizer.push([i]) for i in range(len(chunks))) + detokenizer.finish()
        start = string.index(stop)
        assert text == string[: start + len(stop) * include]
        assert detokenizer.stopped == stop
        stop_end = len(string[: start + len(stop)].encode())
        lengths = [sum(map(len, chunks[: i + 1])) for i in range(len(chunks))]
        assert detokenizer.num_output_tokens == next(i + 1 for i, n in enumerate(lengths) if n >= stop_end)


def test_random_stops_match_a_search_character_by_character() -> None:
    rng = random.Random(4)
    for _ in range(4000):
        string = "".join(rng.choices("ab猫", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab猫", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        expected, found = string, None
        for end in range(1, len(string) + 1):
            ending = [stop for stop in stops if string[:end].endswith(stop)]
            if ending:
                found = max(ending, key=len)
                expected = string[: end - len(found)]
                break
        chunks = random_cuts(string.encode(), rng)
        detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks), stops)
        text = detokenizer.push(range(len(chunks))) + detokenizer.finish()
        assert (text, detokenizer.stopped) == (expected, found), (string, stops)


def test_the_stop_string_that_ends_first_wins_and_of_those_the_longest() -> None:
    for chunks in ([b"xabcd"], [b"x", b"a", b"b", b"c", b"d"]):
        detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks), ["abcd", "c", "bc"])
        assert detokenizer.push(range(len(chunks))) == "xa" and detokenizer.stopped == "bc"


def test_text_that_may_begin_a_stop_string_is_held_until_decided() -> None:
    chunks = [b"one <", b"/s", b"> two", b"</", b"s"]
    detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks), ["</stop>", "</s!"])
    assert [detokenizer.push([i]) for i in range(5)] == ["one ", "", "</s> two", "", ""]
    assert detokenizer.finish() == "</s"


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = IncrementalDetokenizer(chunk_tokenizer([b"a", b"STOP", b"b"]), ["STOP"])
    assert detokenizer.push([0, 1, 2]) == "a"
    assert detokenizer.num_output_tokens == 2
    assert detokenizer.push([2]) == "" and detokenizer.finish() == ""
    assert detokenizer.num_output_tokens == 2


def test_stops_are_not_looked_for_in_the_first_min_tokens() -> None:
    chunks = [b"S", b"T", b"ST"]
    detokenizer = IncrementalDetokenizer(chunk_tokenizer(chunks), ["ST"], min_tokens=2)
    assert detokenizer.push([0]) == "S" and detokenizer.push([1]) == "T"
    assert detokenizer.push([2]) == "" and detokenizer.stopped == "ST"


def test_skipped_special_tokens_count_but_show_nothing() -> None:
    tokenizer = chunk_tokenizer([b"a"])
    detokenizer = IncrementalDetokenizer(tokenizer, ["<|im_end|>"])
    assert detokenizer.push([0, 1, 0]) == "aa" and detokenizer.num_output_tokens == 3
    shown = IncrementalDetokenizer(tokenizer, ["<|im_end|>"], skip_special_tokens=False)
    assert shown.push([0, 1, 0]) == "a" and shown.stopped == "<|im_end|>"
