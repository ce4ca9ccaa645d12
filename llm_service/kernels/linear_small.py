"""y = x W^T + b for few rows of x, where the time is that of reading W once: Triton, for CUDA only.

Up to 4 rows go to a GEMV, up to 64 to tensor cores, by linear_table.  W has x's 16 bits, or is in float8 with
one scale a row: then half as much is read, and x stays exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm_service.kernels.float8 import quantize, scaled_product
from llm_service.kernels.gemv import gemv
from llm_service.kernels.gemv_float8 import gemv_float8
from llm_service.kernels.linear_config import COUNTERS, MAX_TILED_ROWS, Config, GemvConfig
from llm_service.kernels.linear_table import configuration, float8_configuration
from llm_service.kernels.tiled import tiled


class SmallLinear:
    """Picks the kernel for a product's shape; PyTorch's where the rows are many or the library is faster."""

    def __init__(self, device: torch.device, launch: dict[str, bool] | None = None) -> None:
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._launch = launch

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[M, K] x [N, K] (+ [N]) -> [M, N], summed in fp32.

        With `scale` [N], W is in float8, x has 16 bits, and N and K are multiples of 16; x is rounded to
        float8 where torch._scaled_mm multiplies.
        """
        (m, k), n = x.shape, weight.shape[0]
        if scale is not None:
            return self._float8(x, weight, bias, scale)
        if not 1 <= m <= MAX_TILED_ROWS or x.dtype.itemsize != 2 or k % 8:
            return F.linear(x, weight, bias)  # no rows, many rows, fp32, or rows of W not 16-byte aligned
        config = configuration(m, n, k)
        if config is None:
            return F.linear(x, weight, bias)
        return self.run(x.contiguous(), weight, bias, config)

    def _float8(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor
    ) -> torch.Tensor:
        (m, k), n = x.shape, weight.shape[0]
        assert x.dtype.itemsize == 2 and k % 16 == 0
        if m == 0:
            return x.new_empty(0, n)
        config = float8_configuration(m, n, k) if m <= MAX_TILED_ROWS else None
        if config is None:
            return self.rounded(x, weight, bias, scale)
        return self.run(x.contiguous(), weight, bias, config, scale)

    def rounded(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """The product of W and x in float8, one scale a row of each."""
        assert scale is not None
        early = self._launch if len(x) <= MAX_TILED_ROWS else None
        return scaled_product(quantize(x, early), weight, bias, scale, x.dtype)

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        config: Config,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product by one configuration."""
        if not isinstance(config, GemvConfig):
            return tiled(x, weight, bias, config, self._counters, self._launch, scale)
        if scale is None:
            return gemv(x, weight, bias, config, self._launch)
        return gemv_float8(x, weight, bias, scale, config, self._launch)
