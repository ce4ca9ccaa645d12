"""The choice of an attention backend."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llm_service.attention.base import select_backend
from tests.llm_service.attention.conftest import INTERPRETED

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


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels' tests run here themselves")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_cuda_backend_is_right_in_tritons_interpreter():
    file = Path(__file__).with_name("test_cuda.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        command, cwd=file.parents[3], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-5000:]
