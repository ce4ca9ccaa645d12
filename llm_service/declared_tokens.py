"""The tokens that the files beside a `tokenizer.json` declare: added ones, special ones, named ones.

Follows `PreTrainedTokenizerFast.from_pretrained` of transformers 5 (tokenization_utils_base.py and
tokenization_utils_tokenizers.py), which leaves the pipeline of `tokenizer.json` as it is, whatever
`tokenizer_class` says: only the classes of single models rebuild it. Of its ways these are kept:
`added_tokens_decoder` hides special_tokens_map.json and added_tokens.json; a later declaration of a token
replaces its flags; a named token that is declared here, or is new, becomes special, one of
`extra_special_tokens` only if it is new; `add_bos_token` and `add_eos_token` are not read, because the
post-processor of `tokenizer.json` decides. Not followed: `fast_tokenizer_files` (copies of `tokenizer.json`
for other versions), `fix_mistral_regex`, and the refusal of fields that have nothing to do with tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from llm_service.vocabulary import read_json
from protos.checkpoint import CheckpointError

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = "extra_special_tokens"
OLD_EXTRA = "additional_special_tokens"  # transformers 4's name
MODEL_NAMES = "model_specific_special_tokens"

# A `tokenizers.AddedToken` where its flags are known, else a string.
Token: TypeAlias = Any


@dataclass(frozen=True)
class DeclaredTokens:
    """Tokens with an id of their own, tokens with a name, and further special ones."""

    by_id: Mapping[int, Token]
    named: Mapping[str, Token]
    extra: Sequence[Token]

    def contents(self) -> dict[str, str]:
        """Contents of the named tokens."""
        return {name: str(token) for name, token in self.named.items()}

    def add_to(self, backend: Any) -> None:
        """Declare the tokens to a pipeline; those without an id there are put at the end."""
        tokens = [self.by_id[token_id] for token_id in sorted(self.by_id)]
        known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
        for token in (*self.named.values(), *self.extra):
            if str(token) not in known and token not in tokens:
                tokens.append(token)
        backend.add_tokens([self._flagged(token) for token in tokens])

    def _flagged(self, token: Token) -> Token:
        if isinstance(token, str):
            return tokenizers.AddedToken(token, special=True)
        if token.content in self.contents().values():
            token.special = True
        return token


def read_declared_tokens(folder: Path, backend: Any) -> DeclaredTokens:
    """What the files beside `tokenizer.json` say of tokens; `backend` is its pipeline.

    Raises:
        CheckpointError: a declaration of the wrong type; whatever else is malformed in the files raises
            what Python or `tokenizers` raise for it.
    """
    fields = read_json(folder / "tokenizer_config.json")
    if OLD_EXTRA in fields and not fields.get(EXTRA):
        fields[EXTRA] = fields.pop(OLD_EXTRA)
    names = {name: fields.pop(name) for name in list(fields) if _is_model_name(name, fields[name])}
    _move_named_extras(fields, names)
    names = names or fields.get(MODEL_NAMES) or {}
    if "added_tokens_decoder" in fields:
        declared = fields["added_tokens_decoder"].items()
        by_id = {int(token_id): tokenizers.AddedToken(**token) for token_id, token in declared}
    else:
        _merge_special_tokens_map(fields, names, read_json(folder / "special_tokens_map.json"))
        by_id = _older_added_tokens(fields, read_json(folder / "added_tokens.json"))
        by_id |= backend.get_added_tokens_decoder()
    return DeclaredTokens(by_id, _named_tokens(fields, names, by_id, backend), _extra_tokens(fields))


def _is_model_name(name: str, value: Any) -> bool:
    """Whether a field names a token that only some models have, such as `start_image_token`."""
    return name.endswith("_token") and name not in STANDARD_NAMES and isinstance(value, str)


def _move_named_extras(fields: dict[str, Any], names: dict[str, Any]) -> None:
    """`extra_special_tokens` given as an object are names of this model's own."""
    if isinstance(fields.get(EXTRA), dict):
        names.update(fields.pop(EXTRA))


def _merge_special_tokens_map(
    fields: dict[str, Any], names: dict[str, Any], special: Mapping[str, Any]
) -> None:
    """special_tokens_map.json, where every token that comes with flags is special."""
    for name, value in special.items():
        if name == EXTRA and isinstance(value, list):
            present = list(fields.get(EXTRA) or [])
            fields[EXTRA] = present + [token for token in map(_special, value) if token not in present]
        else:
            fields[name] = value if name == EXTRA else _special(value)
    _move_named_extras(fields, names)


def _older_added_tokens(fields: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, Token]:
    """added_tokens.json of transformers before 4.34, which has no flags."""
    special = {str(fields[name]) for name in STANDARD_NAMES if fields.get(name)}
    special |= {str(token) for token in fields.get(EXTRA) or ()}
    # `normalized` is said outright: left open it would follow `special`, which a name may still change.
    return {
        token_id: tokenizers.AddedToken(
            content, normalized=content not in special, special=content in special
        )
        for content, token_id in ids.items()
    }


def _named_tokens(
    fields: Mapping[str, Any], names: Mapping[str, Any], by_id: Mapping[int, Token], backend: Any
) -> dict[str, Token]:
    """Standard names first, then those of the model: new tokens get their ids in this order."""
    own = {name: _token(value) for name, value in fields.items() if name.endswith("_token")}
    own = {name: token for name, token in own.items() if name not in STANDARD_NAMES and _is_token(token)}
    standard = _standard_tokens(fields, by_id)
    if backend.padding is not None and "pad_token" not in fields:
        standard["pad_token"] = backend.padding["pad_token"]
    named = standard | own | {name: _token(value) for name, value in names.items()}
    for name, token in named.items():
        if token is not None and not _is_token(token):
            raise CheckpointError(f"tokenizer: {name} is neither a string nor an added token")
    return {name: token for name, token in named.items() if token is not None}


def _standard_tokens(fields: Mapping[str, Any], by_id: Mapping[int, Token]) -> dict[str, Token]:
    """None for a name that is not given; the flags of the token with that content count, if there is one."""
    flagged = {token.content: token for token in by_id.values()}
    tokens = {name: _token(fields.get(name)) for name in STANDARD_NAMES}
    return {name: None if token is None else flagged.get(str(token), token) for name, token in tokens.items()}


def _extra_tokens(fields: Mapping[str, Any]) -> list[Token]:
    extra = fields[EXTRA] if EXTRA in fields else fields.get(OLD_EXTRA)
    if not isinstance(extra, (list, type(None))):
        raise CheckpointError(f"tokenizer: {EXTRA} is neither a list nor an object")
    return [_token(value) for value in extra or ()]


def _is_token(value: Any) -> bool:
    return isinstance(value, (str, tokenizers.AddedToken))


def _token(value: Any) -> Token:
    """The token that a field spells out with its flags, else the value itself."""
    if not isinstance(value, dict) or value.get("__type") != "AddedToken":
        return value
    return tokenizers.AddedToken(**{name: flag for name, flag in value.items() if name != "__type"})


def _special(value: Any) -> Token:
    if not isinstance(value, dict):
        return value
    flags = {name: flag for name, flag in value.items() if name not in ("special", "__type")}
    return tokenizers.AddedToken(**flags, special=True)
