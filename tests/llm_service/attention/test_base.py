"""The choice of an attention backend."""

import logging
from pathlib import Path

import pytest
import torch

from llm_service.attention.base import Machine, choose_backend, select_backend
from tests.interpreter import run_in_interpreter, starts_interpreter

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def machine(capability=None, has_flash_attn=True):
    device = CPU if capability is None else torch.device("cuda", 0)
    return Machine(device, capability, has_flash_attn)


def test_the_choice_and_its_reason_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        backend = select_backend("auto", CPU)
    assert backend.name == "sdpa" and backend.block_size == 16
    assert "sdpa" in caplog.text and "cpu" in caplog.text


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="'flash3'.*auto, sdpa, cuda"):
        select_backend("flash3", CPU)


def test_the_cuda_backend_is_refused_where_there_is_no_cuda():
    with pytest.raises(ValueError, match="'cuda'.*not cpu"):
        select_backend("cuda", CPU)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_auto_is_flash_attn_on_ampere_and_ada_where_it_is_installed(capability):
    assert choose_backend("auto", machine(capability), BF16)[0] == "flash-attn"
    chosen, reason = choose_backend("auto", machine(capability, has_flash_attn=False), BF16)
    assert chosen == "cuda" and "flash-attn is not installed" in reason
    assert choose_backend("auto", machine(capability), FP32)[0] == "cuda"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (10, 0), (12, 0)])
def test_auto_is_cuda_on_every_other_gpu(capability):
    assert choose_backend("auto", machine(capability), BF16)[0] == "cuda"


def test_auto_is_sdpa_without_a_gpu_whatever_is_installed():
    assert choose_backend("auto", machine(), BF16)[0] == "sdpa"


def test_a_named_backend_is_taken_where_it_runs():
    for name in ("sdpa", "cuda", "flash-attn"):
        assert choose_backend(name, machine((9, 0)), BF16) == (name, "asked for by name")


@pytest.mark.parametrize(
    ("where", "dtype", "message"),
    [
        (machine(), BF16, "'flash-attn' needs a CUDA device, not cpu"),
        (machine((9, 0), has_flash_attn=False), BF16, "'flash-attn' needs the package flash-attn.*gpu"),
        (machine((9, 0)), FP32, "'flash-attn' needs dtype bfloat16 or float16, not float32"),
        (machine((7, 5)), BF16, "'flash-attn' needs compute capability 8.0 or newer, not 7.5"),
    ],
)
def test_flash_attn_by_name_says_what_it_lacks(where, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_backend("flash-attn", where, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gets_the_backend_with_graphs(caplog):
    with caplog.at_level(logging.INFO):
        backend = select_backend("auto", torch.device("cuda"))
    assert backend.name == "cuda" and backend.supports_graphs
    assert "attention backend: cuda" in caplog.text


@starts_interpreter
def test_the_cuda_backend_is_right_in_tritons_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_cuda.py"))
