"""What the tokenizer files of a checkpoint amount to: pieces of text, added tokens, names, a prefix.

Knows neither the kinds of files there are nor what a prompt is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from protos.checkpoint import CheckpointError

SPACE_GLYPH = "\u2581"  # SentencePiece writes a space as this character
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class AddedToken:
    """A token matched as a whole string; `lstrip`/`rstrip` swallow the white space beside it."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class PieceModel(Protocol):
    """What a vocabulary does with text in which no special token is recognised."""

    vocab_size: int
    strips_leading_space: bool

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of `text`; `at_start` is False when a special token comes before it in the same string."""

    def piece_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that an ordinary token stands for, b"" for an id without a token."""


@dataclass(frozen=True)
class Vocabulary:
    """`bos_ids` come before every prompt; `named_tokens` are contents by name (`eos_token`, ...)."""

    pieces: PieceModel
    added_tokens: Mapping[int, AddedToken]
    bos_ids: Sequence[int]
    named_tokens: Mapping[str, str]


def sentencepiece_bytes(piece: str, may_be_byte: bool) -> bytes:
    """UTF-8 bytes of a SentencePiece piece; `<0x0A>` is a byte where the model falls back to bytes."""
    byte = _BYTE_PIECE.fullmatch(piece) if may_be_byte else None
    return bytes.fromhex(byte.group(1)) if byte else piece.replace(SPACE_GLYPH, " ").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, none if there is no such file.

    Raises:
        CheckpointError: the file holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
