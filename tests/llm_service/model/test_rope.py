"""Frequencies of every kind against transformers', and the rotation against its definition."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llm_service.model.rope import RopeConfig, RotaryTable, rotate

HEAD_DIM = 64
THETA = 5e5
KINDS = {
    "linear": ({"factor": 4.0}, {}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": ({"factor": 4.0}, {"attention_factor": 1.1386294361119892}),
    "dynamic": ({"factor": 2.0}, {}),
}


def reference(kind, fields):
    rope = {"rope_type": kind, "rope_theta": THETA, **fields}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 2048
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters=rope,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_those_of_transformers(kind):
    fields, ours = KINDS[kind]
    expected, scale = ROPE_INIT_FUNCTIONS[kind](reference(kind, fields), torch.device("cpu"))
    config = RopeConfig(THETA, kind, fields["factor"], 2048, **ours)
    torch.testing.assert_close(config.inverse_frequencies(HEAD_DIM), expected, rtol=1e-6, atol=0)
    assert config.attention_factor == pytest.approx(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_bit_equal_to_transformers(dtype):
    rotary = LlamaRotaryEmbedding(reference("default", {}))
    heads = torch.randn(7, 3, HEAD_DIM).to(dtype)
    positions = torch.tensor([0, 1, 2, 100, 101, 8191, 5])
    cos, sin = rotary(heads, positions[None])
    by_head = heads.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(by_head, by_head, cos, sin)
    table = RotaryTable(RopeConfig(THETA), HEAD_DIM, 8192, dtype, torch.device("cpu"))
    assert torch.equal(rotate(heads, *table(positions)), expected[0].transpose(0, 1))
