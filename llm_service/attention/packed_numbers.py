"""A step's small integer tensors, gathered on the host and sent to the device in one copy."""

from __future__ import annotations

from array import array

import torch

# Sections start on a boundary of 64 bytes: Triton compiles a kernel once for aligned pointers and once
# more for others.
ALIGNMENT = 16


class PackedNumbers:
    """Sections of int32 numbers, in the order they were added."""

    def __init__(self) -> None:
        self._numbers = array("i")
        self._sections: list[tuple[int, tuple[int, ...]]] = []  # start and shape

    def add(self, numbers: list[int], *shape: int) -> None:
        """Append a section with `shape`, a vector unless told otherwise."""
        self._begin(shape or (len(numbers),))
        self._numbers.extend(numbers)

    def add_rows(self, rows: list[list[int]]) -> None:
        """Append a table whose rows are filled up with zeros to the longest."""
        width = max(map(len, rows))
        self._begin((len(rows), width))
        for row in rows:
            self._numbers.extend(row)
            self._numbers.extend([0] * (width - len(row)))

    def to(self, device: torch.device) -> list[torch.Tensor]:
        """One int32 tensor a section.  The host does not wait for a GPU's earlier work."""
        if not self._numbers:  # of which PyTorch makes no tensor; sections without numbers need none
            return [torch.zeros(shape, dtype=torch.int32, device=device) for _, shape in self._sections]
        host = torch.frombuffer(self._numbers, dtype=torch.int32)
        if device.type == "cuda":
            host = host.pin_memory()
        sent = host.to(device, non_blocking=True)
        return [
            sent[start : start + torch.Size(shape).numel()].view(shape) for start, shape in self._sections
        ]

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._numbers.extend([0] * (-len(self._numbers) % ALIGNMENT))
        self._sections.append((len(self._numbers), shape))
