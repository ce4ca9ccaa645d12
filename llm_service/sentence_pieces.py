"""A bare SentencePiece `tokenizer.model`, used as the slow InternLM2 and LLaMA classes use it.

InternLM2's class is remote code, so what both do is re-enacted here on `sentencepiece`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_service.vocabulary import SPACE_GLYPH, AddedToken, Vocabulary, read_json, sentencepiece_bytes
from protos.checkpoint import CheckpointError


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
        return sentencepiece_bytes(self._model.id_to_piece(token_id), self._model.is_byte(token_id))

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


def read_sentencepiece(folder: Path) -> Vocabulary:
    """`tokenizer.model` with the declarations beside it.

    Raises:
        CheckpointError: a class that is not known, or a special token without an id.
    """
    config = read_json(folder / "tokenizer_config.json")
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
    return Vocabulary(SentencePieces(model, reserved, legacy), added, bos_ids, named)


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
    specials_map = read_json(folder / "special_tokens_map.json")
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
    for content, token_id in read_json(folder / "added_tokens.json").items():
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
