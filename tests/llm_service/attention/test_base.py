"""The choice of an attention backend."""

import logging
from pathlib import Path

import pytest
import torch

from llm_service.attention.base import select_backend
from tests.interpreter import run_in_interpreter, starts_interpreter

CPU = torch.device("cpu")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gets_the_backend_with_graphs(caplog):
    with caplog.at_level(logging.INFO):
        backend = select_backend("auto", torch.device("cuda"))
    assert backend.name == "cuda" and backend.supports_graphs
    assert "cuda (the fastest on cuda)" in caplog.text


@starts_interpreter
def test_the_cuda_backend_is_right_in_tritons_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_cuda.py"))
