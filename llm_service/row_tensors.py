"""Rows of a batch and small tensors about them, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tensor_on(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Without waiting for the device: a non-blocking copy from pageable memory has read it on return."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def select_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The rows, in their order; the tensor itself where that is all of them."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, tensor_on(rows, torch.int64, tensor.device))
