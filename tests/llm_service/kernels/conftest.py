"""Where kernels can run: on a CUDA device, or in Triton's interpreter, which must be chosen before Triton is
imported and so has a process of its own (test_ops.py starts it)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.interpreter import CAN_RUN_KERNELS, DEVICE

KERNEL_TESTS = (
    "test_gemv",
    "test_gemv_float8",
    "test_tiled",
    "test_tuning",
    "test_linear_small",
    "test_float8",
    "test_fused",
    "test_argmax",
    "test_triton_ops",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CAN_RUN_KERNELS:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; test_ops.py runs it in Triton's interpreter")
    for item in items:
        if item.module.__name__.startswith(__package__) and item.module.__name__.endswith(KERNEL_TESTS):
            item.add_marker(skip)


def pytest_ignore_collect(collection_path) -> bool | None:
    """Kernel tests import Triton."""
    return True if collection_path.stem in KERNEL_TESTS and find_spec("triton") is None else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """What the interpreter rounds wrongly is a share of all numbers, on which some tests set a limit."""
    torch.manual_seed(0)
