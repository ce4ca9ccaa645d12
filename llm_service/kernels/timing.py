"""What the decoder's kernels take on this GPU, beside cuBLAS and the bandwidth; run with `python -m`.

`--tune` measures every candidate of the small products; `--write` keeps the best in the table's source file,
for processes that start afterwards.  With `--weights fp8` the matrices are in float8, and beside cuBLAS is
the same product in bf16.  Shapes are InternVL3-8B's; times are medians of CUDA-graph replays.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_service.attention.sdpa import BLOCK_SIZE
from llm_service.kernels.cases import MODEL, SHAPES, Case, Operands, cublas, quantized, random_bf16
from llm_service.kernels.float8 import quantize, silu_mul_quantize
from llm_service.kernels.fused import norm_quantize
from llm_service.kernels.ops import TORCH_OPS, Ops
from llm_service.kernels.triton_ops import TritonOps
from llm_service.kernels.tuning import tune
from llm_service.kv_cache import KVCache, LayerCache
from llm_service.model.decoder import Decoder
from llm_service.model.layers import Linear
from llm_service.model.rope import RotaryTable
from llm_service.model.weights import randomise
from llm_service.parallel import TensorParallel
from llm_service.stopwatch import READ_BYTES_PER_S, seconds

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL_ROWS = (1024, 2668, 8192)


def _us(launches: Sequence[Callable[[], object]]) -> float:
    return 1e6 * seconds(launches)


def print_products(float8: bool) -> None:
    """Every matrix alone."""
    device = torch.device("cuda")
    linear, early = TritonOps(device).linear, TritonOps(device, overlap=True).linear
    print(f"{'product':10}{'rows':>5}{'us':>9}{'GB/s':>7}{'of read':>9}{'early us':>10}{'cuBLAS us':>11}  by")
    for name, (n, k, with_bias) in SHAPES.items():
        for rows in ROWS if name == "lm_head" else (*ROWS, *PREFILL_ROWS):
            case = Case(rows, n, k, with_bias, float8)
            operands = Operands.of(case)
            us, early_us = (operands.us(product) for product in (linear, early))
            cublas_us = operands.in_bf16().us(cublas)
            rate = operands.num_bytes / us / 1e3
            print(
                f"{name:10}{rows:5}{us:9.1f}{rate:7.0f}{rate * 1e9 / READ_BYTES_PER_S:9.2f}"
                f"{early_us:10.1f}{cublas_us:11.1f}  {case.by()}",
                flush=True,
            )


def print_fused(float8: bool) -> None:
    """The kernels between the products, by Triton and by PyTorch."""
    ours = TritonOps(torch.device("cuda"))
    print(f"{'kernel':16}{'rows':>6}{'us':>9}{'GB/s':>7}{'PyTorch us':>12}")
    for rows in (*ROWS, 2668, 8192):
        for name, num_bytes, call in _fused_calls(rows):
            us, torch_us = (_us([partial(call, ops)] * 16) for ops in (ours, TORCH_OPS))
            print(f"{name:16}{rows:6}{us:9.1f}{num_bytes / us / 1e3:7.0f}{torch_us:12.1f}", flush=True)
        for name, num_bytes, float8_call, torch_call in _float8_calls(rows) if float8 else ():
            us, torch_us = (_us([call] * 16) for call in (float8_call, torch_call))
            print(f"{name:16}{rows:6}{us:9.1f}{num_bytes / us / 1e3:7.0f}{torch_us:12.1f}", flush=True)


def _float8_calls(rows: int) -> list[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    """(name, bytes read and written, call, the same in PyTorch without the rounding of SwiGLU and norm)."""
    size, inner, eps = MODEL.hidden_size, MODEL.intermediate_size, MODEL.rms_norm_eps
    x, residual, weight = random_bf16(rows, size), random_bf16(rows, size), random_bf16(size)
    gate_up = random_bf16(rows, 2 * inner)
    return [
        ("quantize", 3 * x.numel(), partial(quantize, x), partial(quantized, x)),
        (
            "norm_quantize",
            7 * x.numel(),
            partial(norm_quantize, x, residual, weight, eps),
            partial(TORCH_OPS.add_rms_norm, x, residual, weight, eps),
        ),
        (
            "silu_quantize",
            5 * gate_up.numel() // 2,
            partial(silu_mul_quantize, gate_up),
            partial(TORCH_OPS.silu_mul, gate_up),
        ),
    ]


def _fused_calls(rows: int) -> list[tuple[str, int, Callable[[Ops], object]]]:
    """(name, bytes read and written, call)."""
    size, inner, eps = MODEL.hidden_size, MODEL.intermediate_size, MODEL.rms_norm_eps
    hidden, residual, weight = random_bf16(rows, size), random_bf16(rows, size), random_bf16(size)
    gate_up, qkv = random_bf16(rows, 2 * inner), random_bf16(rows, SHAPES["qkv"][0])
    device = torch.device("cuda")
    table = RotaryTable(MODEL.rope, MODEL.head_dim, MODEL.max_position_embeddings, torch.bfloat16, device)
    positions = torch.arange(rows, device=device)
    slots = (rows // BLOCK_SIZE + 1, BLOCK_SIZE, MODEL.num_kv_heads, MODEL.head_dim)
    cache = LayerCache(random_bf16(*slots), random_bf16(*slots))
    calls: list[tuple[str, int, Callable[[Ops], object]]] = [
        ("add_rms_norm", 8 * hidden.numel(), lambda ops: ops.add_rms_norm(hidden, residual, weight, eps)),
        ("silu_mul", 3 * gate_up.numel(), lambda ops: ops.silu_mul(gate_up)),
        (
            "rotate_and_cache",
            4 * qkv.numel(),
            lambda ops: ops.rotate_and_cache(
                qkv, ops.rotation(table, positions), None, eps, cache, positions
            ),
        ),
    ]
    if rows <= max(ROWS):
        logits = random_bf16(rows, MODEL.vocab_size)
        calls.append(("argmax", 2 * logits.numel(), lambda ops: ops.argmax(logits)))
    return calls


@dataclass(frozen=True)
class _Plan:
    slot_mapping: torch.Tensor


class _NoAttention:
    """Returns the queries: what is measured is everything else."""

    name = "none"
    block_size = BLOCK_SIZE

    def attend(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return query


def print_model(float8: bool) -> None:
    """All layers and the output matrix in one graph: the products alone, then with all but attention."""
    device = torch.device("cuda")
    backend: Any = _NoAttention()
    quantization = "fp8" if float8 else "none"
    decoder = Decoder(MODEL, TensorParallel(), backend, torch.bfloat16, device, quantization)
    randomise(decoder, torch.bfloat16)
    num_blocks = -(-max(PREFILL_ROWS) // BLOCK_SIZE)
    cache = KVCache.allocate(MODEL, num_blocks, BLOCK_SIZE, TensorParallel(), torch.bfloat16, device)
    kinds: dict[str, Ops] = {
        "triton": TritonOps(device),
        "early": TritonOps(device, overlap=True),
    }
    if not float8:  # PyTorch's reference makes 16 bits of the weights anew each time
        kinds = {"cuBLAS": TORCH_OPS, **kinds}
    heads = "".join(f"{part + ' ' + kind:>18}" for part in ("linears", "step") for kind in kinds)
    print(f"\nms, {MODEL.num_layers} layers and head\n{'rows':>5}{heads}")
    for rows in (*ROWS, *PREFILL_ROWS):
        row = f"{rows:5}"
        for run in (_run_linears, _run_step):
            widths = MODEL.hidden_size, MODEL.intermediate_size
            inputs = {width: random_bf16(rows, width) for width in widths}
            for ops in kinds.values():
                decoder.use_ops(ops)
                row += f"{_us([partial(run, decoder, cache, inputs)]) / 1e3:18.3f}"
        print(row, flush=True)


def _run_linears(decoder: Decoder, cache: KVCache, inputs: dict[int, torch.Tensor]) -> None:
    for module in decoder.modules():
        if isinstance(module, Linear):
            rows = inputs[module.weight.shape[1]]
            module(_wanted(rows) if module is decoder.head else rows)


def _run_step(decoder: Decoder, cache: KVCache, inputs: dict[int, torch.Tensor]) -> None:
    hidden = inputs[MODEL.hidden_size]
    positions = torch.arange(len(hidden), device=hidden.device)
    decoder.greedy(_wanted(decoder(hidden, positions, cache, _Plan(positions))))


def _wanted(hidden: torch.Tensor) -> torch.Tensor:
    """The rows whose logits a step needs: all of a decode's, the last of a prefill's."""
    return hidden if len(hidden) <= max(ROWS) else hidden[-1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="measure every candidate, print the table's rows")
    parser.add_argument("--budget-s", type=float, default=3600, help="begin no more tuning after so long")
    parser.add_argument("--json", type=Path, help="keep what was measured for the table here")
    parser.add_argument("--write", action="store_true", help="put the table into its source file")
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--only", choices=("products", "fused", "model"), help="print this part alone")
    options = parser.parse_args()
    float8 = options.weights == "fp8"
    with torch.inference_mode():
        if options.tune:
            tune(float8, options.budget_s, options.json, options.write)
            return
        for part, show in (("products", print_products), ("fused", print_fused), ("model", print_model)):
            if options.only in (None, part):
                show(float8)


if __name__ == "__main__":
    main()
