"""A checkpoint's tokenizer: text to ids as its own library gives them, ids to bytes one token at a time.

The kinds of vocabulary behind it are `fast_pieces` and `sentence_pieces`; no code of a checkpoint ever runs.
Knows nothing about chat templates or prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llm_service.fast_pieces import read_fast
from llm_service.sentence_pieces import read_sentencepiece
from llm_service.vocabulary import AddedToken, PieceModel, Vocabulary
from protos.checkpoint import CheckpointError


class Tokenizer:
    """Ids, special tokens and bytes of one checkpoint's vocabulary."""

    def __init__(
        self,
        pieces: PieceModel,
        added_tokens: Mapping[int, AddedToken],
        bos_ids: Sequence[int],
        named_tokens: Mapping[str, str],
    ) -> None:
        self._pieces = pieces
        self._added = dict(added_tokens)
        self._added_ids = {token.content: token_id for token_id, token in added_tokens.items()}
        self._bytes: dict[int, bytes] = {}
        self.bos_ids = list(bos_ids)
        self.named_tokens = dict(named_tokens)
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added_tokens.items() if token.special
        }
        self.vocab_size = max([pieces.vocab_size, *(token_id + 1 for token_id in added_tokens)])
        self._special_pattern = alternation(self.special_tokens)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's own end-of-sequence token."""
        content = self.named_tokens.get("eos_token")
        return None if content is None else self._added_ids.get(content)

    @property
    def strips_leading_space(self) -> bool:
        """Whether decoding drops the one space that encoding puts before the text."""
        return self._pieces.strips_leading_space

    def is_special(self, token_id: int) -> bool:
        token = self._added.get(token_id)
        return token is not None and token.special

    def is_added(self, token_id: int) -> bool:
        """Whether the id is an added token, special or not: its text is taken letter for letter."""
        return token_id in self._added

    def token_id(self, content: str) -> int:
        """Id of an added token.

        Raises:
            CheckpointError: the tokenizer has no such added token.
        """
        if content not in self._added_ids:
            raise CheckpointError(f"tokenizer: there is no token {content!r}")
        return self._added_ids[content]

    def encode_plain(self, text: str, *, at_start: bool = True) -> list[int]:
        """Ids of text in which no special token is recognised; nothing is put before it."""
        return self._pieces.encode(text, at_start=at_start)

    def split_specials(self, text: str) -> list[str | int]:
        """Cut trusted text at its special tokens: runs of text as they are, special tokens as ids."""
        pieces: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > end:
                pieces.append(text[end : match.start()])
            pieces.append(self.special_tokens[match.group()])
            end = match.end()
        return [*pieces, text[end:]] if end < len(text) else pieces

    def encode(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of a string given as plain runs and special ids, without `bos_ids`.

        `encode(split_specials(text))` are the ids the library gives for the whole of `text`.
        """
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            text = self._stripped(pieces, position, piece)
            if text:
                ids.extend(self.encode_plain(text, at_start=position == 0))
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD.

        Unlike transformers' slow classes, no space is put around special tokens that are shown.
        """
        stream = ByteStream(self, skip_special_tokens)
        return b"".join(map(stream.push, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Raw UTF-8 bytes of one token (alone they may be no valid UTF-8); b"" for an unused id."""
        if token_id not in self._bytes:
            added = self._added.get(token_id)
            self._bytes[token_id] = added.content.encode() if added else self._pieces.piece_bytes(token_id)
        return self._bytes[token_id]

    def _stripped(self, pieces: Sequence[str | int], position: int, text: str) -> str:
        before = pieces[position - 1] if position > 0 else None
        after = pieces[position + 1] if position + 1 < len(pieces) else None
        if isinstance(before, int) and self._added[before].rstrip:
            text = text.lstrip()
        if isinstance(after, int) and self._added[after].lstrip:
            text = text.rstrip()
        return text


class ByteStream:
    """The visible bytes of a growing token sequence, one token at a time."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, never_skipped: Iterable[str] = ()
    ) -> None:
        """`never_skipped` are special tokens that are shown in any case."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._never_skipped = frozenset(map(tokenizer.token_id, never_skipped))
        self._at_start = True

    def push(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        is_skipped = tokenizer.is_special(token_id) and token_id not in self._never_skipped
        if self._skip_special_tokens and is_skipped:
            return b""
        data = tokenizer.token_bytes(token_id)
        if data and self._at_start:
            self._at_start = False
            if tokenizer.strips_leading_space and not tokenizer.is_added(token_id):
                return data.removeprefix(b" ")
        return data


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer files of a checkpoint folder.

    Raises:
        CheckpointError: no tokenizer there, or one of a kind that is not known.
    """
    vocabulary = _read_vocabulary(folder)
    return Tokenizer(vocabulary.pieces, vocabulary.added_tokens, vocabulary.bos_ids, vocabulary.named_tokens)


def _read_vocabulary(folder: Path) -> Vocabulary:
    if (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file():
        return read_fast(folder)
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder)
    raise CheckpointError(f"{folder}: no tokenizer.json, vocab.json + merges.txt or tokenizer.model")


def alternation(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the strings, the longest first; never matches if there are none."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
