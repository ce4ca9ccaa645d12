"""The engine's own figures against their goals, and float8's gains."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.bench import inside, report
from deploy.bench.engine_step import prefill_flop
from llm_service.model.config import DecoderConfig
from llm_service.model.rope import RopeConfig
from tests.deploy.bench.test_report import PEERS, result, row


def measured(quantization: str, prefill_ms: float, decode_ms: float) -> dict[str, Any]:
    return {
        "quantization": quantization,
        "prefill": {"8192": {"ms": prefill_ms, "tflop_s": 1.0, "peak_share": 140 / prefill_ms}},
        "decode": {"1": {"ms": decode_ms, "read_share": 3 / decode_ms}},
    }


def by_key(*results: dict[str, Any]) -> dict[str, inside.Figure]:
    return {figure.key: figure for figure in inside.figures(inside.join(results))}


def test_bf16_has_the_goals_and_float8_its_gains() -> None:
    found = by_key(measured("none", 190, 3.6), measured("fp8", 140, 2.3), measured("fp8-head", 140, 2.0))
    assert found["bf16_prefill_8192_peak_share"].value == pytest.approx(140 / 190)
    assert found["bf16_prefill_8192_peak_share"].verdict == "reached"
    assert found["bf16_decode_1_read_share"].verdict == "reached"
    assert found["fp8_decode_1_gain"].value == pytest.approx(3.6 / 2.3)
    assert found["fp8_decode_1_gain"].verdict == "reached"
    assert found["fp8_prefill_8192_gain"].verdict == "missed"
    assert found["fp8-head_decode_1_gain"].verdict == ""


def test_float8_alone_has_no_gain() -> None:
    assert not any("gain" in key for key in by_key(measured("fp8", 140, 2.3)))


def test_the_report_shows_both_weights_side_by_side() -> None:
    plain = result(text=[row("text", 1, tpot_p50_ms=3.6, out_tok_s=270.0)])
    plain["float8"] = result(text=[row("text", 1, tpot_p50_ms=2.4, out_tok_s=405.0)])
    plain["inside"] = inside.join([measured("none", 190, 3.6), measured("fp8", 130, 2.4)])
    text = report.markdown(plain, PEERS)
    assert "| text | 1 | a token p50, ms | 3.6 | 2.4 | 1.50 |" in text
    assert "| text | 1 | tokens/s | 270 | 405 | 1.50 |" in text
    assert "| prefill of 8,192 tokens, fp8 against bf16, times faster | 1.46 | 1.40 | reached |" in text
    assert report.join([plain, result()])["inside"] == plain["inside"]


def test_a_prefills_work_is_its_products_and_half_the_square_of_attention() -> None:
    model = DecoderConfig(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        vocab_size=32,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeConfig(1e4),
        max_position_embeddings=64,
    )
    layer = 8 * (8 + 2 * 4) + 8 * 8 + 2 * 8 * 16 + 16 * 8
    attention = 4 * 8 * (1 + 2 + 3)
    assert prefill_flop(model, 3) == 2 * (2 * layer * 3 + attention) + 2 * 8 * 32
