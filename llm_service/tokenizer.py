"""A checkpoint's tokenizer: text to ids as its own library gives them, ids to bytes one token at a time.

Two kinds of vocabulary lie behind it: `tokenizer.json` (or `vocab.json` + `merges.txt`) through
transformers' fast classes, and a bare SentencePiece `tokenizer.model`, whose slow class is remote code
for InternLM2 and is therefore re-enacted here on `sentencepiece`. No code of a checkpoint ever runs.
Knows nothing about chat templates or prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._at_start = True

    def push(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        if self._skip_special_tokens and tokenizer.is_special(token_id):
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
    if (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file():
        return _load_fast(folder)
    if (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder)
    raise CheckpointError(f"{folder}: no tokenizer.json, vocab.json + merges.txt or tokenizer.model")


def alternation(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the strings, the longest first; never matches if there are none."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


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
            return _sentencepiece_bytes(piece, self._byte_fallback)
        if all(glyph in self._byte_of_glyph for glyph in piece):
            return bytes(self._byte_of_glyph[glyph] for glyph in piece)
        return piece.encode()


class SentencePieces:
    """A SentencePiece model used run by run, as the slow InternLM2 and LLaMA classes do.

    Follows tokenization_internlm2.py and, with `legacy=False`, transformers 4's tokenization_llama.py:
    there only the string as a whole gets a leading space, never a run after a special token.
    """

    def __init__(self, model: bytes, reserved: Mapping[int, str], legacy: bool) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        self.strips_leading_space: bool = proto.normalizer_spec.add_dummy_prefix
        if not legacy:
            proto.normalizer_spec.add_dummy_prefix = False
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(proto.SerializeToString())
        self._legacy = legacy
        self._reserved = reserved
        self._unknown: str = self._model.id_to_piece(self._model.unk_id())
        self.vocab_size: int = self._model.get_piece_size()

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        ids = self._encode_legacy(text) if self._legacy else self._encode_run(text, at_start)
        if self._reserved.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._spelled(token_id)]

    def piece_bytes(self, token_id: int) -> bytes:
        if token_id >= self.vocab_size or self._model.is_control(token_id):
            return b""
        return _sentencepiece_bytes(self._model.id_to_piece(token_id), self._model.is_byte(token_id))

    def _encode_legacy(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids

    def _encode_run(self, text: str, at_start: bool) -> list[int]:
        """Leading spaces survive only behind another piece, so `<unk>` is put there and cut off again."""
        text = text.replace(SPACE_GLYPH, " ")
        if at_start:
            text = SPACE_GLYPH + text
        if not text.startswith((SPACE_GLYPH, " ")):
            return self._encode_legacy(text)
        return self._encode_legacy(self._unknown + text)[len(self._encode_legacy(self._unknown)) :]

    def _spelled(self, token_id: int) -> list[int]:
        """A piece of the model whose slot a special token has taken, spelled out character by character.

        InternLM2 keeps `<|im_end|>` in the slot of "[UNUSED_TOKEN_145]": text with that spelling must not
        end a turn.
        """
        if token_id not in self._reserved:
            return [token_id]
        return [part for char in self._model.id_to_piece(token_id) for part in self._char_ids(char)]

    def _char_ids(self, char: str) -> list[int]:
        unknown = self._model.unk_id()
        token_id: int = self._model.piece_to_id(char)
        if token_id != unknown:
            return [token_id]
        fallback = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
        return [unknown] if unknown in fallback else fallback


def _sentencepiece_bytes(piece: str, may_be_byte: bool) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece) if may_be_byte else None
    return bytes.fromhex(byte.group(1)) if byte else piece.replace(SPACE_GLYPH, " ").encode()


def _byte_of_glyph() -> dict[str, int]:
    """GPT-2's glyph of every byte: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    glyphs = {chr(byte): byte for byte in printable}
    return glyphs | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _without_first_space(backend: Any) -> Any:
    """The pipeline for runs that follow a special token, where "first" gives no leading space."""
    import tokenizers

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


def _load_fast(folder: Path) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # The classes are named here, not looked up: AutoTokenizer would consult `auto_map`.
    reader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else Qwen2Tokenizer
    try:
        library = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise CheckpointError(f"{folder}: the tokenizer files cannot be read") from error
    backend = library.backend_tokenizer
    bos_ids = _prepended_ids(folder, backend)
    added = {
        token_id: AddedToken(token.content, token.special, token.lstrip, token.rstrip)
        for token_id, token in library.added_tokens_decoder.items()
    }
    named = {name: str(content) for name, content in library.special_tokens_map.items()}
    return Tokenizer(FastPieces(backend), added, bos_ids, named)


def _prepended_ids(folder: Path, backend: Any) -> list[int]:
    plain: list[int] = backend.encode("a", add_special_tokens=False).ids
    whole: list[int] = backend.encode("a", add_special_tokens=True).ids
    count = len(whole) - len(plain)
    if whole[count:] != plain:
        raise CheckpointError(f"{folder}: the tokenizer appends tokens to a prompt (add_eos_token)")
    return whole[:count]


def _load_sentencepiece(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    class_name = str(config.get("tokenizer_class", "LlamaTokenizer"))
    if class_name not in ("InternLM2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast"):
        raise CheckpointError(f"{folder}/tokenizer_config.json: tokenizer_class {class_name!r} is not known")
    if config.get("add_eos_token"):
        raise CheckpointError(f"{folder}: the tokenizer appends tokens to a prompt (add_eos_token)")
    named = _named_tokens(config)
    legacy = class_name == "InternLM2Tokenizer" or config.get("legacy") in (None, True)
    model = (folder / "tokenizer.model").read_bytes()
    added = _added_tokens(folder, config, named, model)
    reserved = {token_id: token.content for token_id, token in added.items() if token.special}
    bos = [token_id for token_id, content in reserved.items() if content == named["bos_token"]]
    bos_ids = bos if config.get("add_bos_token", True) else []
    return Tokenizer(SentencePieces(model, reserved, legacy), added, bos_ids, named)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Contents of bos, eos, unk and pad; the defaults are those of both slow classes."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if config.get(name) is not None:
            named[name] = _content(config[name])
    return named


def _added_tokens(
    folder: Path, config: Mapping[str, Any], named: Mapping[str, str], model: bytes
) -> dict[int, AddedToken]:
    """Added tokens by id: `added_tokens_decoder`, else `added_tokens.json` (transformers before 4.34)."""
    specials_map = _read_json(folder / "special_tokens_map.json")
    extra = [
        _content(token)
        for source in (config, specials_map)
        for token in source.get("additional_special_tokens") or ()
    ]
    special = {*named.values(), *extra}
    added = {
        int(token_id): AddedToken(
            token["content"],
            bool(token.get("special")) or token["content"] in special,
            bool(token.get("lstrip")),
            bool(token.get("rstrip")),
        )
        for token_id, token in (config.get("added_tokens_decoder") or {}).items()
    }
    known = {token.content for token in added.values()}
    for content, token_id in _read_json(folder / "added_tokens.json").items():
        if content not in known:
            added[token_id] = AddedToken(content, content in special)
    return added | _special_pieces(folder, special - {token.content for token in added.values()}, model)


def _special_pieces(folder: Path, contents: Iterable[str], model: bytes) -> dict[int, AddedToken]:
    """Special tokens that have no id of their own because they are pieces of the model, such as `<s>`."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    found: dict[int, AddedToken] = {}
    for content in contents:
        token_id = processor.piece_to_id(content)
        if processor.id_to_piece(token_id) != content:
            raise CheckpointError(f"{folder}: special token {content!r} has no id")
        found[token_id] = AddedToken(content, special=True)
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
