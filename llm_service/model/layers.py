"""The decoder's parts, each holding one rank's share of its weights and able to take that share from
a whole checkpoint tensor. Names of checkpoint tensors are not known here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llm_service.kernels.ops import TORCH_OPS, Ops, Rows
from llm_service.model.float8 import FLOAT8, MULTIPLE, Float8Rows, quantize_rows
from llm_service.parallel import TensorParallel

# Rows that the packed layout is chosen for; measured best from 1 to 256 rows alike (a hint of 1 is not).
PACKED_ROWS = 8


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy with conversion; shapes must be equal, broadcasting would hide a wrong checkpoint."""
    expect_shape(target, source)
    target.copy_(source)


def expect_shape(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(f"shape is {list(source.shape)}, the config says {list(target.shape)}")


def expect_rows(tensor: torch.Tensor, rows: int) -> None:
    """A whole tensor, before this rank's rows are cut out of it."""
    if tensor.shape[0] != rows:
        raise ValueError(f"has {tensor.shape[0]} rows, the config says {rows}")


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, in Llama's order: computed in fp32, cast, then times the weight."""

    ops: Ops = TORCH_OPS

    def __init__(self, *shape: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(*shape, dtype=dtype, device=device)
        self.eps = eps
        self.float8 = False  # whether a product with a matrix in float8 follows

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        fill(self.weight, tensor)

    def forward(self, hidden: torch.Tensor) -> Rows:
        return self.ops.rms_norm(hidden, self.weight, self.eps, self.float8)

    def add(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[Rows, torch.Tensor]:
        """The norm of hidden + residual, and that sum; without a residual, `hidden` is the sum."""
        if residual is None:
            return self.forward(hidden), hidden
        return self.ops.add_rms_norm(hidden, residual, self.weight, self.eps, self.float8)


class HeadNorm(RMSNorm):
    """RMSNorm of each query and key head, side by side with the weights of either."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_heads + num_kv_heads, head_dim, eps=eps, dtype=dtype, device=device)
        self.num_heads = num_heads

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        """`part` is "q" or "k"; `tensor` is [head_dim]."""
        fill(self.weight[0], tensor)  # checks the shape
        rows = slice(None, self.num_heads) if part == "q" else slice(self.num_heads, None)
        self.weight[rows] = tensor.to(self.weight)


class Linear(nn.Module):
    """y = x W^T + b over this rank's rows or columns."""

    ops: Ops = TORCH_OPS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None
        self.packed: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None  # [out_features] fp32, where the weight is in float8

    def quantize(self) -> None:
        """Hold the weight in float8, if the GPU multiplies by this shape; call before it is put in."""
        rows, columns = self.weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            return
        device = self.weight.device
        self.weight = parameter(rows, columns, dtype=FLOAT8, device=device)
        self.scale = torch.empty(rows, dtype=torch.float32, device=device)

    def put(self, kind: str, source: torch.Tensor, rows: slice = slice(None)) -> None:
        """Copy rows of the weight or of the bias in, converted or quantised to what this layer holds."""
        target = self.get_parameter(kind)[rows]
        if kind == "bias" or self.scale is None:
            fill(target, source)
            return
        expect_shape(target, source)
        quantize_rows(source, target, self.scale[rows])

    def forward(self, x: Rows) -> torch.Tensor:
        if self.packed is None or isinstance(x, Float8Rows):
            return self.ops.linear(x, self.weight, self.bias, self.scale)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return output

    def pack(self, keep_weight: bool = False) -> None:
        """Reorder the weight into oneDNN's blocked layout, once, and drop the plain one.

        F.linear reorders in every call: measured on 2 cores of an AVX-512 machine, packing is 1.7x
        faster at 1 row and 3x at 8 rows in fp32, 1.0x and 1.6x in bf16.
        """
        if not can_pack(self.weight):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_ROWS)
        if not keep_weight:
            self.weight = parameter(0, dtype=self.weight.dtype, device=self.weight.device)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has fast kernels for this dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class QKVLinear(Linear):
    """q, k and v in one matrix, by whole heads: queries, then keys, then values."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = parallel.share(num_heads)
        kv_heads = parallel.share_kv_heads(num_kv_heads)
        self.head_dim = head_dim
        self.num_heads = heads.stop - heads.start
        self.num_kv_heads = kv_heads.stop - kv_heads.start
        rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        super().__init__(hidden_size, rows, bias=bias, dtype=dtype, device=device)
        self._sources = {  # part -> whole heads, this rank's heads, first head in our matrix
            "q": (num_heads, heads, 0),
            "k": (num_kv_heads, kv_heads, self.num_heads),
            "v": (num_kv_heads, kv_heads, self.num_heads + self.num_kv_heads),
        }

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        """`part` is "q", "k" or "v"; `tensor` holds all heads' rows."""
        num_heads, heads, first = self._sources[part]
        expect_rows(tensor, num_heads * self.head_dim)
        source = tensor[heads.start * self.head_dim : heads.stop * self.head_dim]
        start = first * self.head_dim
        self.put(kind, source, slice(start, start + len(source)))


class GateUpLinear(Linear):
    """gate and up in one matrix, gate first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.share = parallel.share(intermediate_size)
        self.intermediate_size = intermediate_size
        rows = 2 * (self.share.stop - self.share.start)
        super().__init__(hidden_size, rows, bias=bias, dtype=dtype, device=device)

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        """`part` is "gate" or "up"; `tensor` holds all rows."""
        expect_rows(tensor, self.intermediate_size)
        half = self.share.stop - self.share.start
        self.put(kind, tensor[self.share], slice(half) if part == "gate" else slice(half, None))


class RowParallelLinear(Linear):
    """Columns by rank, the ranks' outputs summed; rank 0 alone adds the bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.share = parallel.share(in_features)
        self.in_features = in_features
        self.parallel = parallel
        columns = self.share.stop - self.share.start
        super().__init__(columns, out_features, bias=bias, dtype=dtype, device=device)

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        if kind == "bias":
            self.put(kind, tensor if self.parallel.rank == 0 else tensor * 0)
            return
        if tensor.shape[1:] != (self.in_features,):
            raise ValueError(f"shape is {list(tensor.shape)}, needs {self.in_features} columns")
        self.put(kind, tensor[:, self.share])

    def forward(self, x: Rows) -> torch.Tensor:
        return self.parallel.all_reduce(super().forward(x))


class VocabShare:
    """This rank's rows of a matrix of `vocab_size` rows, padded with zero rows to divide evenly.

    And to multiples of MULTIPLE: rows of logits that are not aligned to 16 bytes cost cuBLAS half its speed.
    """

    def __init__(self, vocab_size: int, parallel: TensorParallel) -> None:
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // (parallel.size * MULTIPLE)) * MULTIPLE
        self.start = parallel.rank * self.rows
        self.end = min(vocab_size, self.start + self.rows)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the whole matrix, without padding."""
        expect_rows(tensor, self.vocab_size)
        return tensor[self.start : max(self.start, self.end)]


class VocabParallelEmbedding(nn.Module):
    """Token embeddings by rows of the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.share = VocabShare(vocab_size, parallel)
        self.weight = parameter(self.share.rows, hidden_size, dtype=dtype, device=device)

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        rows = self.share.cut(tensor)
        fill(self.weight[: len(rows)], rows)
        self.weight[len(rows) :] = 0

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden_size]."""
        if self.parallel.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.share.start
        elsewhere = (local < 0) | (local >= self.share.rows)
        embeds = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(embeds.masked_fill_(elsewhere[:, None], 0))


class VocabParallelHead(Linear):
    """The output matrix by rows of the vocabulary; logits of all rows on every rank."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parallel = parallel
        self.share = VocabShare(vocab_size, parallel)
        super().__init__(hidden_size, self.share.rows, bias=False, dtype=dtype, device=device)

    def load(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        rows = self.share.cut(tensor)
        self.put(kind, rows, slice(len(rows)))
        padding = rows.new_zeros(self.share.rows - len(rows), rows.shape[1])
        self.put(kind, padding, slice(len(rows), None))

    def forward(self, hidden: Rows) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]."""
        return self.parallel.all_gather(super().forward(hidden))[:, : self.share.vocab_size]
