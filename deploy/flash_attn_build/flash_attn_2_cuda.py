"""The module that the package `flash_attn` imports for its kernels: those that this build has.

Lies beside the library, as a module of its own; knows nothing of Tessera.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

torch.ops.load_library(str(Path(__file__).with_name("libflash_attn_2_forward.so")))
_operators = torch.ops.flash_attn_2_forward

fwd = _operators.fwd
varlen_fwd = _operators.varlen_fwd
fwd_kvcache = _operators.fwd_kvcache


def bwd(*_: object) -> NoReturn:
    """Raises NotImplementedError."""
    raise NotImplementedError("this build of flash-attn has no backward")


varlen_bwd = bwd
