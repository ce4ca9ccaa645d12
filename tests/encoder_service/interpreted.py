"""Where tests run Triton kernels: on the GPU, or in Triton's interpreter where there is none.

The interpreter must be chosen before Triton is imported: test_vision.py starts a process for it.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# All of these import Triton.
KERNEL_TESTS = (
    "tests/encoder_service/test_resample_kernels.py",
    "tests/encoder_service/test_gpu_tiling.py",
    "tests/encoder_service/test_tower_graphs.py",
    "tests/encoder_service/test_cuda_vision.py",
    "tests/encoder_service/model/test_fused_kernels.py",
    "tests/encoder_service/model/test_fused_vision.py",
)
