"""Visual tokens in 8 bits: float8 e4m3 with a scale for each token, half of what bfloat16 takes."""

from __future__ import annotations

import torch

from protos.tensors import TensorFormatError, tensor_bytes, tensor_from_bytes

DTYPE = torch.float8_e4m3fn
SCALE_BYTES = torch.float32.itemsize


def quantized_bytes(num_tokens: int, hidden_size: int) -> int:
    """Of a payload: the values, row by row, then the scales."""
    return num_tokens * (hidden_size * DTYPE.itemsize + SCALE_BYTES)


def payload_bytes(dtype: torch.dtype, num_tokens: int, hidden_size: int) -> int:
    """Of a tile in any encoding."""
    if dtype is DTYPE:
        return quantized_bytes(num_tokens, hidden_size)
    return num_tokens * hidden_size * dtype.itemsize


def quantize(embeds: torch.Tensor) -> memoryview:
    """The payload of [num_tokens, hidden_size]: a token's largest value becomes e4m3's largest, 448."""
    values = embeds.detach().cpu().float()
    scales = values.abs().amax(dim=1, keepdim=True) / torch.finfo(DTYPE).max
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    payload = torch.empty(quantized_bytes(*embeds.shape), dtype=torch.uint8)
    split = embeds.numel() * DTYPE.itemsize
    payload[:split].view(DTYPE).view(embeds.shape).copy_(values / scales)
    payload[split:] = scales.view(-1).view(torch.uint8)
    return tensor_bytes(payload)


def dequantize(payload: bytes | memoryview, num_tokens: int, hidden_size: int) -> torch.Tensor:
    """float32 [num_tokens, hidden_size]

    Raises:
        TensorFormatError: it has another size.
    """
    if len(payload) != quantized_bytes(num_tokens, hidden_size):
        raise TensorFormatError(f"{len(payload)} bytes cannot be {num_tokens} tokens of {hidden_size}")
    split = num_tokens * hidden_size * DTYPE.itemsize
    view = memoryview(payload)
    values = tensor_from_bytes(view[:split], DTYPE, (num_tokens, hidden_size)).float()
    # A copy: behind an odd number of values the scales are not aligned.
    return values.mul_(tensor_from_bytes(bytes(view[split:]), torch.float32, (num_tokens, 1)))
