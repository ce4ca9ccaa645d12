"""Tensors as bytes: the only place that knows byte layout.  No loops, no numpy bfloat16, no pickle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from protos import tensor_pb2

_DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_FLOAT8_E4M3: torch.float8_e4m3fn,
    tensor_pb2.DTYPE_FLOAT8_E5M2: torch.float8_e5m2,
}
_WIRE_DTYPES = {dtype: wire for wire, dtype in _DTYPES.items()}


class TensorFormatError(ValueError):
    """Shape, dtype and number of bytes of a wire tensor do not agree."""


def dtype_to_proto(dtype: torch.dtype) -> tensor_pb2.DType:
    """Raises TensorFormatError for a dtype that has no place on the wire."""
    if dtype not in _WIRE_DTYPES:
        raise TensorFormatError(f"{dtype} has no wire encoding")
    return _WIRE_DTYPES[dtype]


def dtype_from_proto(dtype: tensor_pb2.DType) -> torch.dtype:
    """Raises TensorFormatError for unspecified and unknown dtypes."""
    if dtype not in _DTYPES:
        raise TensorFormatError(f"unknown wire dtype {dtype}")
    return _DTYPES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major; a view without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_from_bytes(
    data: bytes | bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """A tensor over `data` without a copy: read-only where `data` is, and it keeps `data` alive.

    Raises:
        TensorFormatError: the number of bytes is not product(shape) * element size.
    """
    shape = tuple(shape)
    numel = 1
    for size in shape:
        numel *= size
    if numel * dtype.itemsize != len(data):
        raise TensorFormatError(f"{len(data)} bytes cannot be {dtype} of shape {shape}")
    if numel == 0:  # frombuffer refuses empty buffers
        return torch.empty(shape, dtype=dtype)
    if not memoryview(data).readonly:
        return torch.frombuffer(data, dtype=dtype).view(shape)
    with warnings.catch_warnings():  # read-only buffers are what arrives from the wire
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype).view(shape)


def tensor_to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        shape=tensor.shape, dtype=dtype_to_proto(tensor.dtype), data=bytes(tensor_bytes(tensor))
    )


def tensor_from_proto(message: tensor_pb2.Tensor) -> torch.Tensor:
    """Raises TensorFormatError where shape, dtype and data disagree."""
    data = bytearray(message.data)  # a writable copy: tensors of callers must be theirs
    return tensor_from_bytes(data, dtype_from_proto(message.dtype), message.shape)
