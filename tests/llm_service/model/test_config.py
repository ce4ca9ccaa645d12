"""Facts read from config.json of either format, and refusals that name what is not supported."""

from pathlib import Path

import pytest

from llm_service.model.config import ARCHITECTURES, FAMILIES, DecoderConfig
from llm_service.model.rope import RopeConfig
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat


def config_of(fields, top=None, format=CheckpointFormat.CHAT) -> DecoderConfig:
    name = "llm_config" if format is CheckpointFormat.CHAT else "text_config"
    config = {name: fields} | (top or {})
    return DecoderConfig.from_checkpoint(Checkpoint(Path("somewhere"), config, format, {}))


def chat(architecture, **fields):
    return {"architectures": [architecture], **fields}


def test_internvl3_1b_keeps_bias_and_caps_dynamic_rope_at_its_context():
    config = config_of(
        chat(
            "Qwen2ForCausalLM",
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=151674,
            rope_theta=1e6,
            rope_scaling={"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            max_position_embeddings=32768,
        )
    )
    assert (config.head_dim, config.num_kv_heads, config.vocab_size) == (64, 2, 151674)
    assert config.qkv_bias and not (config.o_bias or config.qk_norm or config.packed_qkv)
    assert config.rope == RopeConfig(1e6, "dynamic") and config.max_position_embeddings == 32768
    assert not config.tie_word_embeddings


def test_qwen3_has_its_own_head_dim_and_norms_without_bias():
    config = config_of(chat("Qwen3ForCausalLM", hidden_size=1024, num_attention_heads=16))
    assert config.head_dim == 128 and config.qk_norm and not config.qkv_bias


def test_internlm2_is_packed_and_its_bias_field_covers_all_of_attention():
    config = config_of(chat("InternLM2ForCausalLM", bias=False, rope_theta=1e6, rms_norm_eps=1e-5))
    assert config.packed_qkv and not config.qkv_bias and config.rms_norm_eps == 1e-5
    assert config_of(chat("InternLM2ForCausalLM")).o_bias


def test_missing_kv_heads_mean_one_for_each_head():
    config = config_of(chat("LlamaForCausalLM", num_attention_heads=40, hidden_size=5120))
    assert config.num_kv_heads == 40


def test_hf_files_omit_what_equals_the_class_default():
    config = config_of({"model_type": "qwen3"}, {}, CheckpointFormat.HF)
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (4096, 32, 151936)


def test_hf_ties_unless_told_otherwise_and_the_original_only_if_told():
    assert config_of({"model_type": "qwen2"}, {}, CheckpointFormat.HF).tie_word_embeddings
    untied = {"tie_word_embeddings": False}
    assert not config_of({"model_type": "qwen2"}, untied, CheckpointFormat.HF).tie_word_embeddings
    assert not config_of(chat("Qwen2ForCausalLM")).tie_word_embeddings
    assert config_of(chat("Qwen2ForCausalLM", tie_word_embeddings=True)).tie_word_embeddings


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 3}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 3}},
    ],
)
def test_both_spellings_of_rope_settings_mean_the_same(spelling):
    config = config_of(chat("LlamaForCausalLM", **spelling))
    assert config.rope == RopeConfig(5e5, "linear", 3.0)


@pytest.mark.parametrize(
    "architecture",
    [*sorted(set(ARCHITECTURES.values()) - set(FAMILIES)), "InternLM2VEForCausalLM"],
)
def test_other_families_are_refused_by_name(architecture):
    with pytest.raises(CheckpointError, match=f"{architecture}.*not supported"):
        config_of(chat(architecture))


def test_an_hf_family_is_refused_by_its_architecture():
    with pytest.raises(CheckpointError, match="GptOssForCausalLM"):
        config_of({"model_type": "gpt_oss"}, {}, CheckpointFormat.HF)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "'llama3' lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, named):
    with pytest.raises(CheckpointError, match=named):
        config_of(chat("Qwen2ForCausalLM", **fields))


def test_a_config_without_language_model_is_refused():
    checkpoint = Checkpoint(Path("somewhere"), {}, CheckpointFormat.HF, {})
    with pytest.raises(CheckpointError, match="text_config is missing"):
        DecoderConfig.from_checkpoint(checkpoint)
