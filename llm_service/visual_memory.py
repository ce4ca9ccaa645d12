"""The visual-token store's memory: one shared segment, written by front ends, read by every rank.

The segment has no name: whoever may use it is handed its file descriptor over a unix socket, so nothing is
left behind when a process is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from protos.page_lock import PageLock

SHARED_MEMORY_DIR = Path("/dev/shm")


class VisualMemory:
    """Slots of `slot_tokens` visual tokens of `hidden_size` elements each."""

    def __init__(
        self, fd: int, num_slots: int, slot_tokens: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        """Takes ownership of the descriptor."""
        self.fd = fd
        self._lock: PageLock | None = None
        shape = (num_slots, slot_tokens, hidden_size)
        self._map = mmap.mmap(fd, num_slots * slot_tokens * hidden_size * dtype.itemsize)
        self._slots = torch.frombuffer(self._map, dtype=dtype).view(shape)

    @classmethod
    def create(cls, num_slots: int, slot_tokens: int, hidden_size: int, dtype: torch.dtype) -> VisualMemory:
        """Raises OSError where shared memory is too small."""
        size = num_slots * slot_tokens * hidden_size * dtype.itemsize
        folder = SHARED_MEMORY_DIR if SHARED_MEMORY_DIR.is_dir() else None
        fd, name = tempfile.mkstemp(prefix="tessera-visual-", dir=folder)
        os.unlink(name)
        try:
            # Reserving now turns a full /dev/shm into an error at start instead of a SIGBUS under load.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
            return cls(fd, num_slots, slot_tokens, hidden_size, dtype)
        except BaseException:
            os.close(fd)
            raise

    def pin(self) -> None:
        """Let the GPU copy from it while the CPU goes on."""
        self._lock = PageLock(self._slots.data_ptr(), self._slots.nbytes, "visual store")

    def write(self, slot: int, embeds: torch.Tensor) -> None:
        """Store [num_tokens, hidden_size]; the element type is converted where the encoder's differs."""
        self._slots[slot, : embeds.shape[0]].copy_(embeds)

    def rows(self, slot: int, first_row: int, num_rows: int) -> torch.Tensor:
        """A view [num_rows, hidden_size]."""
        return self._slots[slot, first_row : first_row + num_rows]

    def close(self) -> None:
        """Close the descriptor, if it is open; the mapping lives as long as tensors over it do."""
        if self._lock is not None:
            self._lock.release()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
