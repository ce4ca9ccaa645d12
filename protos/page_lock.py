"""Memory of our own mapping, locked for a GPU: its copies to and from it need not wait for the CPU."""

from __future__ import annotations

import logging
from contextlib import suppress

import torch

log = logging.getLogger(__name__)


class PageLock:
    """Where it is refused, copies are only slower.  Needs a CUDA device."""

    def __init__(self, address: int, num_bytes: int, name: str) -> None:
        """`name` is for the log."""
        self._address = address
        error = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
        self._is_held = int(error) == 0
        if not self._is_held:
            log.warning("%s: page-locking was refused (CUDA error %d)", name, int(error))
            with suppress(RuntimeError):  # the next kernel would report that error as its own
                torch.zeros(1, device="cuda")

    def release(self) -> None:
        """Before it is unmapped: CUDA would take what is mapped there next for these pages.  Idempotent."""
        if self._is_held:
            self._is_held = False
            torch.cuda.cudart().cudaHostUnregister(self._address)
