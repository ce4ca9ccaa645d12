"""Fills a decoder from a checkpoint: names of both formats to ours, each tensor cut to this rank's share.

Tensors stream one at a time; a missing or an unused one is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from llm_service.attention.base import AttentionBackend
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.parallel import TensorParallel
from protos.checkpoint import Checkpoint, CheckpointError, listing

LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("none", "fp8", "fp8-head")
DUMMY_STD = 0.02
# (prefix of the body, prefix of the output matrix): the original and old -HF names, then today's -HF.
PREFIXES = (
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
)
# Buffers that old Llama checkpoints stored; RoPE is computed from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Names:
    """What a family of checkpoints calls things; layer names map to (our module, part of it)."""

    embedding: str
    norm: str
    head: str
    layer: Mapping[str, tuple[str, str]]


LLAMA_NAMES = Names(
    embedding="embed_tokens",
    norm="norm",
    head="lm_head",
    layer={
        "input_layernorm": ("attention_norm", ""),
        "self_attn.q_proj": ("attention.qkv", "q"),
        "self_attn.k_proj": ("attention.qkv", "k"),
        "self_attn.v_proj": ("attention.qkv", "v"),
        "self_attn.q_norm": ("attention.qk_norm", "q"),
        "self_attn.k_norm": ("attention.qk_norm", "k"),
        "self_attn.o_proj": ("attention.o", ""),
        "post_attention_layernorm": ("mlp_norm", ""),
        "mlp.gate_proj": ("mlp.gate_up", "gate"),
        "mlp.up_proj": ("mlp.gate_up", "up"),
        "mlp.down_proj": ("mlp.down", ""),
    },
)
INTERNLM2_NAMES = Names(
    embedding="tok_embeddings",
    norm="norm",
    head="output",
    layer={
        "attention_norm": ("attention_norm", ""),
        "attention.wqkv": ("attention.qkv", "packed"),
        "attention.wo": ("attention.o", ""),
        "ffn_norm": ("mlp_norm", ""),
        "feed_forward.w1": ("mlp.gate_up", "gate"),
        "feed_forward.w3": ("mlp.gate_up", "up"),
        "feed_forward.w2": ("mlp.down", ""),
    },
)


@dataclass(frozen=True)
class _Target:
    """Where a checkpoint tensor goes: `kind` (weight, bias) of `part` of a module."""

    module: str
    part: str
    kind: str


def load_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    parallel: TensorParallel,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    quantization: str = "none",
) -> Decoder:
    """Build the decoder and fill it; "dummy" makes random weights on the device and reads no tensor.

    With "fp8" the layers' matrices become float8 as they come in: they are never whole in `dtype`; with
    "fp8-head" the output matrix, too.

    Raises:
        CheckpointError: tensors are missing, unused or of another shape than the config says.
        ValueError: unknown `load_format` or `quantization`, or a dimension that the ranks cannot share.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}; known: {', '.join(LOAD_FORMATS)}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; known: {', '.join(QUANTIZATIONS)}")
    decoder = Decoder(config, parallel, backend, dtype, device, quantization).eval()
    with torch.inference_mode():
        if load_format == "dummy":
            randomise(decoder, dtype)
        else:
            _load(decoder, checkpoint)
        decoder.pack()
    return decoder


def _load(decoder: Decoder, checkpoint: Checkpoint) -> None:
    names = set(checkpoint.language_names())
    targets = _targets(decoder, *_prefixes(names))
    head = next(name for name, target in targets.items() if target.module == "head")
    tied = decoder.config.tie_word_embeddings and head not in names
    if tied:
        del targets[head]
    _compare(names, targets.keys(), checkpoint)
    for name, tensor in checkpoint.load(sorted(targets)):
        try:
            _place(decoder, targets[name], tensor)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name!r}: {error}") from None
    if tied:
        decoder.tie_head()


def _prefixes(names: Iterable[str]) -> tuple[str, str]:
    """Prefixes of the body and of the output matrix, which old and new -HF files mix."""
    body = next(
        (body for body, _ in PREFIXES if any(name.startswith(body) for name in names)),
        PREFIXES[0][0],
    )
    head = next((head for _, head in PREFIXES if f"{head}lm_head.weight" in names), None)
    return body, dict(PREFIXES)[body] if head is None else head


def _targets(decoder: Decoder, body: str, head: str) -> dict[str, _Target]:
    """Every tensor that the decoder needs, by its name in the checkpoint."""
    names = INTERNLM2_NAMES if decoder.config.packed_qkv else LLAMA_NAMES
    modules = [
        (f"{body}{names.embedding}", "embedding", ""),
        (f"{body}{names.norm}", "norm", ""),
        (f"{head}{names.head}", "head", ""),
    ]
    modules += [
        (f"{body}layers.{index}.{stored}", f"layers.{index}.{module}", part)
        for index in range(decoder.config.num_layers)
        for stored, (module, part) in names.layer.items()
    ]
    present = dict(decoder.named_modules())
    return {
        f"{stored}.{kind}": _Target(module, part, kind)
        for stored, module, part in modules
        if module in present
        for kind, _ in present[module].named_parameters()
    }


def _compare(names: set[str], expected: Iterable[str], checkpoint: Checkpoint) -> None:
    wanted = set(expected)
    missing = sorted(wanted - names)
    unused = sorted(name for name in names - wanted if not name.endswith(IGNORED_SUFFIXES))
    problems = [
        f"{problem} tensors: {listing(listed)}"
        for problem, listed in (("missing", missing), ("unused", unused))
        if listed
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: language model: {'; '.join(problems)}")


def _place(decoder: Decoder, target: _Target, tensor: torch.Tensor) -> None:
    module = decoder.get_submodule(target.module)
    parts = [(target.part, tensor)]
    if target.part == "packed":
        parts = list(_unpack(tensor, decoder.config))
    for part, piece in parts:
        module.load(part, target.kind, piece)  # type: ignore[operator]


def _unpack(tensor: torch.Tensor, config: DecoderConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """InternLM2's wqkv: for each KV head its query heads' rows, then its key's, then its value's."""
    queries = config.num_heads // config.num_kv_heads
    shape = (config.num_kv_heads, queries + 2, config.head_dim)
    if tensor.shape[0] != shape[0] * shape[1] * shape[2]:
        raise ValueError(f"has {tensor.shape[0]} rows, the config says {shape[0]}x{shape[1]}x{shape[2]}")
    groups = tensor.unflatten(0, shape)
    yield "q", groups[:, :queries].flatten(0, 2)
    yield "k", groups[:, queries].flatten(0, 1)
    yield "v", groups[:, queries + 1].flatten(0, 1)


def randomise(decoder: Decoder, dtype: torch.dtype) -> None:
    """Weights that keep activations finite at any depth; the same on every run, quantised or not."""
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        elif parameter.dtype is dtype:
            parameter.normal_(0, DUMMY_STD, generator=generator)
        else:
            module, _, kind = name.rpartition(".")
            random = torch.empty_like(parameter, dtype=dtype).normal_(0, DUMMY_STD, generator=generator)
            decoder.get_submodule(module).put(kind, random)  # type: ignore[operator]
