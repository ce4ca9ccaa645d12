"""Tensors survive the wire bit for bit, whatever their dtype and shape."""

from __future__ import annotations

import pytest
import torch

from protos import tensor_pb2
from protos.tensors import (
    TensorFormatError,
    dtype_from_proto,
    dtype_to_proto,
    tensor_bytes,
    tensor_from_bytes,
    tensor_from_proto,
    tensor_to_proto,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3), (2, 3, 4, 5)]


def some(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_survives_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(shape, dtype)
    wire = tensor_to_proto(tensor).SerializeToString()
    back = tensor_from_proto(tensor_pb2.Tensor.FromString(wire))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_or_strided_tensor_is_sent_row_major(dtype: torch.dtype) -> None:
    tensor = some((4, 6), dtype)
    for view in (tensor.t(), tensor[:, ::2], tensor[1:3]):
        assert bits(tensor_from_proto(tensor_to_proto(view))) == bits(view)


def test_bytes_are_little_endian() -> None:
    assert bytes(tensor_bytes(torch.tensor([1.0, -2.0]))) == bytes.fromhex("0000803f000000c0")
    assert bytes(tensor_bytes(torch.tensor([1.0], dtype=torch.bfloat16))) == bytes.fromhex("803f")


def test_nan_payloads_and_signed_zero_are_kept() -> None:
    tensor = torch.tensor([0x7FC1, 0xFF81 - 0x10000, -0x8000], dtype=torch.int16).view(torch.bfloat16)
    assert bits(tensor_from_proto(tensor_to_proto(tensor))) == bits(tensor)


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.zeros(4)
    view = tensor_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == bytes.fromhex("0000803f")


def test_bytes_become_a_tensor_without_a_copy() -> None:
    data = bytearray(8)
    tensor = tensor_from_bytes(data, torch.float32, [2])
    data[4:] = bytes.fromhex("0000803f")
    assert tensor.tolist() == [0.0, 1.0]


def test_a_received_tensor_may_be_written_to() -> None:
    received = tensor_from_proto(tensor_to_proto(torch.ones(3)))
    received += 1
    assert received.tolist() == [2.0, 2.0, 2.0]


def test_a_gradient_does_not_hinder_sending() -> None:
    assert tensor_to_proto(torch.ones(2, requires_grad=True)).shape == [2]


@pytest.mark.parametrize("num_bytes", [0, 1, 23, 25, 48])
def test_a_wrong_number_of_bytes_is_refused(num_bytes: int) -> None:
    with pytest.raises(TensorFormatError, match=f"^{num_bytes} bytes cannot be torch.float32 of shape"):
        tensor_from_bytes(bytes(num_bytes), torch.float32, (2, 3))


def test_bytes_for_an_empty_tensor_are_refused() -> None:
    with pytest.raises(TensorFormatError):
        tensor_from_bytes(b"1234", torch.float32, (0, 7))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.complex64], ids=str)
def test_a_dtype_without_a_wire_encoding_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TensorFormatError, match=str(dtype)):
        tensor_to_proto(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("number", [tensor_pb2.DTYPE_UNSPECIFIED, 99])
def test_an_unknown_wire_dtype_is_refused(number: tensor_pb2.DType) -> None:
    with pytest.raises(TensorFormatError, match=str(int(number))):
        tensor_from_proto(tensor_pb2.Tensor(dtype=number))


def test_every_wire_dtype_has_a_tensor_dtype() -> None:
    numbers = [number for number in tensor_pb2.DType.values() if number != tensor_pb2.DTYPE_UNSPECIFIED]
    assert [dtype_to_proto(dtype_from_proto(number)) for number in numbers] == numbers
