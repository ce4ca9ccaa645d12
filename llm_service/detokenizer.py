"""Token ids to text as they come: whole characters only, cut at the first stop string.

Constant work per token: bytes of each token go through an incremental UTF-8 decoder, so that the deltas
joined are exactly `Tokenizer.decode` of all ids. Knows nothing about stop token ids and lengths.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from llm_service.tokenizer import ByteStream, Tokenizer


class IncrementalDetokenizer:
    """Text of one output sequence.

    Text that may be the beginning of a stop string is held back until it is decided. A stop string that
    ends first wins, of those the longest; stops are looked for behind the first `min_tokens` tokens only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str: bool = False,
        min_tokens: int = 0,
        never_skipped: Iterable[str] = (),
    ) -> None:
        """`never_skipped` are special tokens that are shown in any case."""
        assert all(stop_strings), "an empty stop string would stop before the first token"
        self._stream = ByteStream(tokenizer, skip_special_tokens, never_skipped)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_stops = bool(stop_strings)
        self._stops = _StopStrings(stop_strings)
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self.stopped: str | None = None
        self.num_output_tokens = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became certain with these tokens.

        Tokens after the one that completed a stop string are dropped and not in `num_output_tokens`.
        """
        if not self._has_stops:
            data = [self._stream.push(token_id) for token_id in token_ids]
            self.num_output_tokens += len(data)
            return self._utf8.decode(b"".join(data))
        delta = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_output_tokens += 1
            delta += self._advance(self._utf8.decode(self._stream.push(token_id)))
        return delta

    def finish(self) -> str:
        """The rest at the end of the sequence: text held back, U+FFFD for an incomplete character."""
        if self.stopped is not None:
            return ""
        rest = self._advance(self._utf8.decode(b"", final=True))
        return rest if self.stopped is not None else rest + self._stops.flush()

    def _advance(self, text: str) -> str:
        if self.num_output_tokens <= self._min_tokens:
            return text
        free, self.stopped = self._stops.push(text)
        if self.stopped is not None and self._include_stop_str:
            free += self.stopped
        return free


class _StopStrings:
    """A search for several strings in a text that comes in pieces."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is free to go, the stop string found right behind it or None)."""
        held = self._held + text
        found = self._first_match(held)
        if found is not None:
            start, stop = found
            return held[:start], stop
        free = len(held) - self._num_undecided(held)
        self._held = held[free:]
        return held[:free], None

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = []
        for stop in self._stop_strings:
            start = text.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches)[1:] if matches else None

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0
