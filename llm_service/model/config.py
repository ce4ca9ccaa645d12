"""Architecture facts of a decoder, read from config.json; the only file that knows families by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_service.model.rope import KINDS, RopeConfig
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat


@dataclass(frozen=True)
class DecoderConfig:
    """Independent facts; none implies another."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of the embedding, which may exceed the tokenizer's size
    rms_norm_eps: float
    tie_word_embeddings: bool  # only where the checkpoint stores no output matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm on each head of q and k before RoPE
    rope: RopeConfig
    max_position_embeddings: int  # the longest context served
    packed_qkv: bool = False  # stored as InternLM2's wqkv, under InternLM2's names

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> DecoderConfig:
        """Read llm_config (original format) or text_config (-HF).

        Raises:
            CheckpointError: an unsupported family, activation, attention window, RoPE or quantisation.
        """
        section = _Section.of(checkpoint)
        family = FAMILIES.get(section.family)
        if family is None:
            known = ", ".join(sorted(FAMILIES))
            raise section.error(f"language model {section.family!r} is not supported; known: {known}")
        section.refuse_unsupported(checkpoint.config)
        return family(section)


@dataclass(frozen=True)
class _Section:
    """The language model's part of config.json, with errors that name the field."""

    name: str
    fields: Mapping[str, Any]
    family: str
    tie_word_embeddings: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Section:
        is_chat = checkpoint.format is CheckpointFormat.CHAT
        name = checkpoint.language_section
        fields = checkpoint.section(name)
        architecture = next(iter(fields.get("architectures") or [None]))
        model_type = str(fields.get("model_type"))
        family = architecture or ARCHITECTURES.get(model_type, model_type)
        # transformers' InternVL ties unless told otherwise; the original ties only if told.
        tie = checkpoint.config.get("tie_word_embeddings", not is_chat)
        return cls(name, fields, str(family), bool(tie or fields.get("tie_word_embeddings")))

    def get(self, key: str, default: Any) -> Any:
        """The field, or `default` where it is absent or null."""
        value = self.fields.get(key)
        return default if value is None else value

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self.name}: {message}")

    def refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        """Refuse what would be computed wrongly if it were ignored."""
        quantization = self.get("quantization_config", config.get("quantization_config"))
        if quantization:
            method = quantization.get("quant_method")
            raise self.error(f"quantization_config.quant_method {method!r} is not supported")
        activation = self.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act {activation!r} is not supported, only 'silu'")
        if self.get("use_sliding_window", False) or "sliding_attention" in self.get("layer_types", []):
            raise self.error("sliding-window attention is not supported")

    def decoder(
        self,
        defaults: Mapping[str, Any],
        *,
        qkv_bias: bool,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        packed_qkv: bool = False,
    ) -> DecoderConfig:
        """The facts. `defaults` are the family's config class's: -HF files omit fields equal to them."""
        values = {key: self.get(key, default) for key, default in defaults.items()}
        hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
        return DecoderConfig(
            hidden_size=hidden_size,
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=values["num_key_value_heads"] or num_heads,
            head_dim=values.get("head_dim") or self.get("head_dim", hidden_size // num_heads),
            intermediate_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            rms_norm_eps=values["rms_norm_eps"],
            tie_word_embeddings=self.tie_word_embeddings,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            rope=self._rope(values["max_position_embeddings"]),
            max_position_embeddings=values["max_position_embeddings"],
            packed_qkv=packed_qkv,
        )

    def _rope(self, max_positions: int) -> RopeConfig:
        """Both spellings: rope_theta beside rope_scaling, and transformers 5's rope_parameters."""
        scaling = dict(self.get("rope_scaling", {})) | dict(self.get("rope_parameters", {}))
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        theta = float(scaling.get("rope_theta") or self.get("rope_theta", 10000.0))
        if kind not in KINDS:
            raise self.error(f"rope type {kind!r} is not supported; known: {', '.join(KINDS)}")
        rotary_factor = scaling.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if rotary_factor != 1.0:
            raise self.error(f"partial_rotary_factor {rotary_factor} is not supported, only 1.0")
        if kind in ("default", "dynamic"):
            return RopeConfig(theta, kind)
        try:
            return _scaled_rope(theta, kind, scaling, max_positions)
        except KeyError as error:
            raise self.error(f"rope type {kind!r} lacks {error.args[0]!r}") from None


def _scaled_rope(theta: float, kind: str, scaling: Mapping[str, Any], max_positions: int) -> RopeConfig:
    factor = float(scaling["factor"])
    original = int(scaling.get("original_max_position_embeddings") or max_positions)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return RopeConfig(theta, kind, factor, original, low, high)
    return RopeConfig(
        theta,
        kind,
        factor,
        original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=_yarn_attention_factor(scaling, factor),
    )


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """YaRN's 0.1 ln(s) + 1, unless the config says another (as transformers reads it)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if numerator and denominator:
        return magnitude(numerator) / magnitude(denominator)
    return magnitude(1.0)


_COMMON_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
}
_QWEN_DEFAULTS = _COMMON_DEFAULTS | {
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_LLAMA_DEFAULTS = _COMMON_DEFAULTS | {
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def _qwen2(section: _Section) -> DecoderConfig:
    return section.decoder(_QWEN_DEFAULTS, qkv_bias=True)


def _qwen3(section: _Section) -> DecoderConfig:
    bias = bool(section.get("attention_bias", False))
    defaults = _QWEN_DEFAULTS | {"head_dim": 128}
    return section.decoder(defaults, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _llama(section: _Section) -> DecoderConfig:
    bias = bool(section.get("attention_bias", False))
    mlp_bias = bool(section.get("mlp_bias", False))
    return section.decoder(_LLAMA_DEFAULTS, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _internlm2(section: _Section) -> DecoderConfig:
    bias = bool(section.get("bias", True))
    defaults = _LLAMA_DEFAULTS | {"vocab_size": 103168}
    return section.decoder(defaults, qkv_bias=bias, o_bias=bias, packed_qkv=True)


# Keyed by architectures[0]; a family is a function here and nothing anywhere else.
FAMILIES: dict[str, Callable[[_Section], DecoderConfig]] = {
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "LlamaForCausalLM": _llama,
    "InternLM2ForCausalLM": _internlm2,
}
# text_config of -HF checkpoints may carry only model_type.
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
