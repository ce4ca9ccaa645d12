"""Kernels run on a GPU, or in Triton's interpreter, which must be chosen before Triton is imported and so
has a process of its own (test_base.py starts it)."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
