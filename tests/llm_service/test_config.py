"""Settings that cannot work are refused with their name and value."""

from __future__ import annotations

from typing import Any

import pytest

from llm_service.config import EncoderPoolConfig, EngineConfig, LLMConfig
from protos.options import MAX_MESSAGE_BYTES


def test_the_defaults_hold() -> None:
    config = LLMConfig()
    assert config.server.port == 50052
    assert config.encoder_pool.encoders == ("127.0.0.1:50051",)
    assert config.encoder_pool.heartbeat_timeout_s == 0.6


def test_the_model_is_named_as_it_was_given_unless_told_otherwise() -> None:
    assert LLMConfig(model="org/vl").model_name == "org/vl"
    assert LLMConfig(model="org/vl", served_model_name="vl").model_name == "vl"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float8"),
        ("device", "tpu"),
        ("load_format", "pickle"),
        ("attention_backend", "zzz"),
        ("cuda_graphs", "on"),
        ("quantization", "int4"),
        ("tensor_parallel_size", 0),
        ("max_num_seqs", -1),
        ("max_num_batched_tokens", -1),
        ("max_waiting", 0),
        ("max_model_len", -1),
        ("long_prefill_token_threshold", -1),
        ("min_overlap_tokens", -1),
        ("num_kv_blocks", -1),
        ("num_threads", -1),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
        ("kv_cache_gib", 0.0),
        ("visual_store_gib", -1.0),
    ],
)
def test_engine(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        EngineConfig(**{name: value})


def test_the_token_budget_holds_every_decode() -> None:
    EngineConfig(max_num_seqs=64, max_num_batched_tokens=64)
    with pytest.raises(ValueError, match="max_num_batched_tokens.*63.*max_num_seqs.*64"):
        EngineConfig(max_num_seqs=64, max_num_batched_tokens=63)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_credit", -1),
        ("layout_timeout_s", 0.0),
        ("heartbeat_timeout_s", -0.5),
        ("tile_timeout_s", 0.0),
    ],
)
def test_encoder_pool(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        EncoderPoolConfig(**{name: value})


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(ValueError, match="encoders"):
        EncoderPoolConfig(encoders=("127.0.0.1:1", ""))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation_config", "vllm"),
        ("max_images", 0),
        ("max_image_tiles", 0),
        ("max_request_bytes", 0),
        ("max_request_bytes", MAX_MESSAGE_BYTES),
        ("request_timeout_s", 0.0),
        ("engine_timeout_s", 0.0),
    ],
)
def test_service(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        LLMConfig(**{name: value})
