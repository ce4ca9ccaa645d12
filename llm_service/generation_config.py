"""A checkpoint's generation_config.json, as far as it says how to sample where a request does not.

The keys are transformers', and those that vLLM and SGLang read; end tokens are the prompt builder's business.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from llm_service.sampling_params import SamplingParams
from protos.checkpoint import Checkpoint, CheckpointError
from protos.errors import InvalidRequest

FILENAME = "generation_config.json"

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_INTEGERS = {"top_k": "top_k", "max_new_tokens": "max_tokens"}  # key -> field of SamplingParams
# What a request can say on the wire.
_Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


def read_generation_config(checkpoint: Checkpoint) -> SamplingParams:
    """The parameters of a request that names none; a missing file or key and null leave SamplingParams' own.

    `do_sample: false` means greedy decoding, as in transformers, unless the file has a temperature.

    Raises:
        CheckpointError: a value of the wrong type or out of its range; the message names file and key.
    """
    config = checkpoint.read_json(FILENAME) or {}
    file = f"{checkpoint.folder}/{FILENAME}"
    do_sample = _read(config, "do_sample", bool, "true or false", file)
    params = SamplingParams(temperature=0.0) if do_sample is False else SamplingParams()
    for key in _NUMBERS:
        value = _read(config, key, float, "a number", file)
        params = _with(params, key, key, value, file)
    for key, name in _INTEGERS.items():
        value = _read(config, key, _Int32, "a 32-bit integer", file)
        params = _with(params, name, key, value, file)
    return params


def _read(config: dict[str, Any], key: str, kind: Any, words: str, file: str) -> Any:
    """The value as `kind`, or None where the file has none."""
    value = config.get(key)
    try:
        return None if value is None else msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise CheckpointError(f"{file}: {key} must be {words}, got {value!r}") from None


def _with(params: SamplingParams, name: str, key: str, value: Any, file: str) -> SamplingParams:
    """`params` with a value that passes the check which values of requests pass."""
    if value is None:
        return params
    changed = msgspec.structs.replace(params, **{name: value})
    try:
        changed.validate(vocab_size=0)  # nothing here names a token
    except InvalidRequest as error:
        raise CheckpointError(f"{file}: {key}: {error.message.removeprefix(f'{name}: ')}") from None
    return changed
