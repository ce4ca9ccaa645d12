"""Grammars over a vocabulary of bytes: which tokens may come next, as bits, and the state that they move.

llguidance does the work, within limits that bound every call; nothing here knows logits or devices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WORD_BITS = 32
# The library's limits bound a grammar's size and one step's work: the step's are lowered, because a step of
# the engine waits for it (14 k of lexer fuel are a millisecond).
_STEP_LEXER_FUEL = 100_000
_MAX_GRAMMAR_SIZE = 200_000
_PROBE_BYTES = 64
_SPECIAL = b""

Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class GrammarError(ValueError):
    """A grammar that is wrong, or takes too much; the text is the library's, for the log."""


@dataclass(frozen=True)
class _ByteTokens:
    """What LLTokenizer asks a vocabulary for."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


class GrammarVocabulary:
    """The bytes of every token, arranged for masks; about 0.5 s for 150 k tokens.

    An id of its own, behind the last token, stands for "the answer may end here".
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        encode: Callable[[str], list[int]],
        specials: Mapping[str, int] | None = None,
    ) -> None:
        """`tokens` has b"" for special and unused ids: no grammar allows them, unless it names them.

        `specials` are those that it may name: ids of `<...>`.
        Where only one text can follow, `encode` says in which tokens the model knows it.
        """
        self.end_id = len(tokens)
        self._tokens = tokens
        self._encode_text = encode
        self._id_of = {data: token_id for token_id, data in enumerate(tokens) if data}
        self._longest = max(map(len, self._id_of), default=0)
        unused = [token_id for token_id, data in enumerate(tokens) if not data]
        named = list(tokens)
        for name, token_id in (specials or {}).items():
            named[token_id] = name.encode()
        wrapped = _ByteTokens([*named, _SPECIAL], [*unused, self.end_id], self.end_id, self._encode)
        # Slices are the library's precomputed masks of common lexemes.
        self.trie: Any = LLTokenizer(wrapped, slices=LLTokenizer.general_slices())  # type: ignore[arg-type]

    @property
    def num_words(self) -> int:
        return self.end_id // WORD_BITS + 1

    def _encode(self, text: str) -> list[int]:
        """The library allows nothing but these tokens, so their bytes have to be those of the text."""
        ids, data = self._encode_text(text), text.encode()
        if b"".join(self._tokens[token_id] for token_id in ids) == data:
            return ids
        return self._spell(data)

    def _spell(self, data: bytes) -> list[int]:
        """The longest token at each place, up to what no token spells."""
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._id_of), start)
            if end == start:
                break
            ids.append(self._id_of[data[start:end]])
            start = end
        return ids


class Grammar:
    """A grammar ready to start from; each sequence takes a state of its own."""

    def __init__(self, text: str, vocabulary: GrammarVocabulary) -> None:
        """Milliseconds, without the GIL.

        Raises:
            GrammarError: see there.
        """
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.trie, text, log_level=0, limits=_limits())
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._vocabulary)


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self._matcher = matcher
        self._end_id = vocabulary.end_id
        self._is_stuck = False
        self.num_words = vocabulary.num_words

    @property
    def has_failed(self) -> bool:
        """The grammar has taken more than its limits, or no token of the vocabulary can follow."""
        return self._is_stuck or bool(self._matcher.is_error())

    @property
    def is_complete(self) -> bool:
        """The text so far is a whole answer."""
        return bool(self._matcher.is_accepting())

    def fill(self, words: Words, end_ids: Sequence[int], may_end: bool) -> None:
        """Bit i of `words` [num_words] says whether token i may come.

        Where the answer may end, those are `end_ids` too; unless `may_end`, only if nothing else can come.
        After a failure `end_ids` only.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        ends = _take_bit(words, self._end_id)
        if not words.any():
            self._is_stuck = not ends
            may_end = True
        if self.has_failed:
            words[:] = 0
            ends = may_end = True
        if ends and may_end:
            for token_id in end_ids:
                words.view(np.uint32)[token_id // WORD_BITS] |= np.uint32(1 << token_id % WORD_BITS)

    def accept(self, token_id: int) -> None:
        """Move on; `fill` has allowed the token.  A failure shows in `has_failed`."""
        self._matcher.consume_token(token_id)


def probe(text: str, specials: Sequence[str] = (), seed: int = 0) -> None:
    """Build a grammar and follow it for some bytes, to find out whether its limits hold.

    `specials` are the special tokens that it may name.

    Raises:
        GrammarError: see there.
    """
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"" for _ in specials)]
    places = {name: place for place, name in enumerate(specials, 256)}
    vocabulary = GrammarVocabulary(tokens, lambda text: list(text.encode()), places)
    state = Grammar(text, vocabulary).start()
    words = np.zeros(vocabulary.num_words, np.int32)
    choose = random.Random(seed)
    for _ in range(_PROBE_BYTES):
        state.fill(words, (), may_end=True)
        if state.has_failed:
            raise GrammarError("the grammar takes more than its limits")
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if not len(allowed):
            break
        state.accept(int(choose.choice(allowed)))
    if not state.is_complete and not len(allowed):
        raise GrammarError("no text fulfils the grammar")


def _take_bit(words: Words, place: int) -> bool:
    word, bit = place // WORD_BITS, np.uint32(1 << place % WORD_BITS)
    unsigned = words.view(np.uint32)
    was_set = bool(unsigned[word] & bit)
    unsigned[word] &= ~bit
    return was_set


def _limits() -> LLParserLimits:
    return LLParserLimits(
        step_lexer_fuel=_STEP_LEXER_FUEL, max_grammar_size=_MAX_GRAMMAR_SIZE, verbose_errors=False
    )
