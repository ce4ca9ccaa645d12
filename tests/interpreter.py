"""Triton kernels without a GPU: in Triton's interpreter, which must be chosen before Triton is imported.

So their tests have a process of their own wherever there is no GPU; `run_in_interpreter` starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CAN_RUN_KERNELS = INTERPRETED or torch.cuda.is_available()
TIMEOUT_S = 900


def starts_interpreter(test: Callable[[], None]) -> Callable[[], None]:
    """Mark of a test that calls `run_in_interpreter`."""
    here = pytest.mark.skipif(CAN_RUN_KERNELS, reason="the kernels' tests run in this process")
    without = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
    marked: Callable[[], None] = here(without(test))
    return marked


def run_in_interpreter(*paths: Path | str) -> None:
    """Run the tests in these files and folders; fails with what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", *map(str, paths)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-5000:]
