"""What fits, and the errors that say what to change."""

import dataclasses
from pathlib import Path

import pytest
import torch

from llm_service.capacity import (
    MAX_SLOTS,
    MIN_SLOTS,
    check_quantization,
    plan_capacity,
    resolve_device,
    resolve_dtype,
    resolve_limits,
)
from llm_service.config import EngineConfig
from llm_service.kv_cache import bytes_per_block
from llm_service.parallel import TensorParallel
from protos.checkpoint import Checkpoint, CheckpointFormat
from tests.llm_service.model.steps import QWEN3_8B

CPU = torch.device("cpu")
SMALL = dataclasses.replace(QWEN3_8B, num_layers=2, max_position_embeddings=1000)


ONE_RANK = TensorParallel()


def plan(model=SMALL, parallel=ONE_RANK, **settings):
    config = resolve_limits(EngineConfig(**settings), CPU)
    return plan_capacity(config, model, 256, 16, torch.bfloat16, CPU, parallel)


def checkpoint(config):
    return Checkpoint(Path("nowhere"), config, CheckpointFormat.CHAT, {})


def test_the_kv_cache_takes_its_gibibytes_and_no_more():
    size = bytes_per_block(SMALL, 16, torch.bfloat16, TensorParallel())
    blocks = plan(kv_cache_gib=0.01).num_blocks
    assert blocks * size <= 0.01 * 2**30 < (blocks + 1) * size


def test_ranks_share_the_heads_and_so_hold_more_blocks_each():
    assert plan(kv_cache_gib=0.01, parallel=TensorParallel(0, 2)).num_blocks in (
        2 * plan(kv_cache_gib=0.01).num_blocks,
        2 * plan(kv_cache_gib=0.01).num_blocks + 1,
    )


def test_no_more_blocks_than_all_sequences_could_fill():
    assert plan(kv_cache_gib=100.0, max_num_seqs=3).num_blocks == 3 * 63


def test_blocks_asked_for_are_given():
    capacity = plan(num_kv_blocks=7)
    assert capacity.num_blocks == 7 and capacity.max_model_len == 7 * 16


def test_the_context_is_the_checkpoints_where_memory_allows():
    assert plan(kv_cache_gib=1.0).max_model_len == 1000
    assert plan(kv_cache_gib=1.0, max_model_len=300).max_model_len == 300


def test_a_context_that_was_asked_for_and_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="max_model_len 300 needs more than the 7 KV blocks of 16 tokens"):
        plan(num_kv_blocks=7, max_model_len=300)


def test_a_context_beyond_the_checkpoints_is_an_error():
    with pytest.raises(ValueError, match="max_model_len 2000 exceeds the checkpoint's 1000 positions"):
        plan(max_model_len=2000)


def test_no_memory_for_a_single_block_is_an_error():
    with pytest.raises(ValueError, match="no memory for a KV cache on cpu"):
        plan(kv_cache_gib=1e-6)


def test_slots_fill_the_visual_store():
    slot_bytes = 256 * SMALL.hidden_size * 2
    assert plan(visual_store_gib=0.25).num_slots == 2**28 // slot_bytes
    assert plan(visual_store_gib=0.25).slot_tokens == 256
    assert plan(visual_store_gib=1e-9).num_slots == MIN_SLOTS
    assert plan(visual_store_gib=1e6).num_slots == MAX_SLOTS


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"llm_config": {"torch_dtype": "float32"}}, torch.float32),
        ({"torch_dtype": "float8", "text_config": {}}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_auto_is_the_checkpoints_element_type(config, dtype):
    assert resolve_dtype("auto", checkpoint(config)) is dtype
    assert resolve_dtype("float16", checkpoint(config)) is torch.float16


@pytest.mark.parametrize(
    ("settings", "device", "limits"),
    [
        ({}, "cpu", (64, 2048, 1)),
        ({}, "cuda", (256, 8192, 0)),
        (
            {"max_num_seqs": 7, "max_num_batched_tokens": 9, "min_overlap_tokens": 5},
            "cuda",
            (7, 9, 5),
        ),
        ({"max_num_seqs": 5000}, "cpu", (5000, 5000, 1)),
        ({"max_num_batched_tokens": 16}, "cuda", (16, 16, 0)),
    ],
)
def test_the_defaults_of_a_step_are_the_devices_and_give_way_to_what_was_set(settings, device, limits):
    config = resolve_limits(EngineConfig(**settings), torch.device(device))
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.min_overlap_tokens) == limits


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 6), torch.bfloat16, r"fp8 needs a GPU of compute capability 8\.9 or newer, this one has 8\.6"),
        ((9, 0), torch.float16, "fp8 needs dtype bfloat16, got float16"),
    ],
)
def test_float8_where_it_cannot_be_computed_is_an_error(capability, dtype, message):
    check_quantization("none", capability, dtype)
    with pytest.raises(ValueError, match=message):
        check_quantization("fp8", capability, dtype)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_float8_is_for_ada_and_newer(capability):
    check_quantization("fp8", capability, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_computes_with_float8_in_any_dtype(dtype):
    check_quantization("fp8", None, dtype)


def test_devices():
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_unless_it_was_optional():
    assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        resolve_device("cuda")
