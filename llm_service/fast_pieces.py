"""Byte-level and SentencePiece-like BPE, run by the `tokenizers` library, from a checkpoint's files.

A `tokenizer.json` needs that library only; transformers is asked where there are just `vocab.json` and
`merges.txt`, whose pipeline is written in its Qwen2Tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from llm_service.declared_tokens import read_declared_tokens
from llm_service.vocabulary import SPACE_GLYPH, AddedToken, Vocabulary, sentencepiece_bytes
from protos.checkpoint import CheckpointError


class FastPieces:
    """A `tokenizers` pipeline (byte-level or SentencePiece-like BPE)."""

    def __init__(self, backend: Any) -> None:
        # Our own backend: user text never yields a special token, prompts are never cut or padded.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._later_backend = _without_first_space(backend)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        decoder = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
        self._byte_level = '"ByteLevel"' in decoder
        if not self._byte_level and '"Metaspace"' not in decoder and SPACE_GLYPH not in decoder:
            raise CheckpointError("tokenizer.json: the decoder is neither byte-level nor SentencePiece-like")
        self._byte_fallback = '"ByteFallback"' in decoder
        self.strips_leading_space = '"Metaspace"' in decoder or '"Strip"' in decoder
        self._byte_of_glyph = _byte_of_glyph()

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        backend = self._backend if at_start else self._later_backend
        # A batch of one: `encode` keeps the GIL, and a megabyte of text would stop every stream for a second.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def piece_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if not self._byte_level:
            return sentencepiece_bytes(piece, self._byte_fallback)
        if all(glyph in self._byte_of_glyph for glyph in piece):
            return bytes(self._byte_of_glyph[glyph] for glyph in piece)
        return piece.encode()


def read_fast(folder: Path) -> Vocabulary:
    """`tokenizer.json`, or `vocab.json` + `merges.txt`, with the declarations beside them.

    Raises:
        CheckpointError: files that cannot be read, or a pipeline that is not supported.
    """
    read = _read_pipeline if (folder / "tokenizer.json").is_file() else _read_merges
    backend, named = read(folder)
    bos_ids = _prepended_ids(folder, backend)
    added = {
        token_id: AddedToken(token.content, token.special, token.lstrip, token.rstrip)
        for token_id, token in backend.get_added_tokens_decoder().items()
    }
    return Vocabulary(FastPieces(backend), added, bos_ids, named)


def _read_pipeline(folder: Path) -> tuple[Any, dict[str, str]]:
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        declared = read_declared_tokens(folder, backend)
        declared.add_to(backend)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise CheckpointError(f"{folder}: the tokenizer files cannot be read") from error
    return backend, declared.contents()


def _read_merges(folder: Path) -> tuple[Any, dict[str, str]]:
    from transformers import Qwen2Tokenizer

    # The class is named here, not looked up: AutoTokenizer would consult `auto_map`.
    try:
        library = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise CheckpointError(f"{folder}: the tokenizer files cannot be read") from error
    named = {name: str(content) for name, content in library.special_tokens_map.items()}
    return library.backend_tokenizer, named


def _prepended_ids(folder: Path, backend: Any) -> list[int]:
    plain: list[int] = backend.encode("a", add_special_tokens=False).ids
    whole: list[int] = backend.encode("a", add_special_tokens=True).ids
    count = len(whole) - len(plain)
    if whole[count:] != plain:
        raise CheckpointError(f"{folder}: the tokenizer appends tokens to a prompt (add_eos_token)")
    return whole[:count]


def _byte_of_glyph() -> dict[str, int]:
    """GPT-2's glyph of every byte: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    glyphs = {chr(byte): byte for byte in printable}
    return glyphs | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _without_first_space(backend: Any) -> Any:
    """The pipeline for runs that follow a special token, where "first" gives no leading space."""
    first, never = '"prepend_scheme":"first"', '"prepend_scheme":"never"'
    pre_tokenizer = backend.pre_tokenizer
    if pre_tokenizer is None or first not in pre_tokenizer.__getstate__().decode():
        return backend
    state = json.loads(backend.to_str())
    text = json.dumps(state["pre_tokenizer"], separators=(",", ":")).replace(first, never)
    state["pre_tokenizer"] = json.loads(text)
    later = tokenizers.Tokenizer.from_str(json.dumps(state))
    later.encode_special_tokens = True
    return later
