"""What the decoder's kernels take on this GPU, beside cuBLAS and the bandwidth; run with `python -m`.

`--tune` measures every candidate of the small products and prints rows for linear_small's tables; with
`--weights fp8` the matrices are in float8, and beside cuBLAS stands the same product in bf16. Shapes are
InternVL3-8B's; times are medians of CUDA-graph replays, over more weights than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from llm_service.attention.sdpa import BLOCK_SIZE
from llm_service.kernels.float8 import quantize
from llm_service.kernels.linear_small import (
    MAX_TILED_ROWS,
    Config,
    SmallLinear,
    candidates,
    configuration,
    float8_configuration,
)
from llm_service.kernels.ops import TORCH_OPS, Ops
from llm_service.kernels.triton_ops import TritonOps
from llm_service.kv_cache import KVCache, LayerCache
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows
from llm_service.model.layers import Linear
from llm_service.model.rope import RopeConfig, RotaryTable
from llm_service.model.weights import randomise
from llm_service.parallel import TensorParallel

READ_GB_S = 4205  # one H200, read only, measured (component_ceilings_h200)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL_ROWS = (1024, 2668, 8192)
ROW_CLASSES = (1, 2, 4, 16, 32, 64)
COLD_BYTES = 400 << 20  # weights a measurement rotates over: several times the L2 cache
REPLAYS = 7
COMPILERS = 12  # processes
MODEL = DecoderConfig(
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=151674,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeConfig(1e6),
    max_position_embeddings=32768,
)
SHAPES = {
    "qkv": (4608, 3584, True),
    "o": (3584, 3584, False),
    "gate_up": (37888, 3584, False),
    "down": (3584, 18944, False),
    "lm_head": (151674, 3584, False),
}

# x, weight, bias, scale
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def graph_us(launches: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one launch, in a CUDA graph that holds all of them in turn."""
    for launch in launches:  # compiles what is to be compiled
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(1000 * median(times) / len(launches))


@dataclass(frozen=True)
class Case:
    """A product to measure: `rows` rows of x, W [n, k]."""

    rows: int
    n: int
    k: int
    with_bias: bool
    float8: bool

    @property
    def weight_bytes(self) -> int:
        """Of one element of W."""
        return 1 if self.float8 else 2

    def candidates(self) -> Iterator[Config]:
        return candidates(self.rows, self.n, self.k, self.weight_bytes)

    def by(self) -> str:
        """What the engine computes it by."""
        if self.rows > MAX_TILED_ROWS:
            return "_scaled_mm" if self.float8 else "cuBLAS"
        choose = float8_configuration if self.float8 else configuration
        return str(choose(self.rows, self.n, self.k) or "cuBLAS")


@dataclass(frozen=True)
class Operands:
    """One product's rows, and weights enough that none is in the cache when its turn comes."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    bias: torch.Tensor | None
    scales: list[torch.Tensor | None]  # where the weights are in float8

    @classmethod
    def of(cls, case: Case, cold: bool = True) -> Operands:
        n, k = case.n, case.k
        copies = max(2, -(-COLD_BYTES // (case.weight_bytes * n * k))) if cold else 1
        weights = [_random(n, k) * k**-0.5 for _ in range(copies)]
        scales: list[torch.Tensor | None] = [None] * copies
        if case.float8:
            pairs = [_quantized(weight) for weight in weights]
            weights, scales = [values for values, _ in pairs], [scale for _, scale in pairs]
        return cls(_random(case.rows, k), weights, _random(n) if case.with_bias else None, scales)

    def us(self, product: Product) -> float:
        """Microseconds of one product, over at least 16 of them."""
        rounds = -(-16 // len(self.weights))
        weights = list(zip(self.weights, self.scales, strict=True)) * rounds
        return graph_us([partial(product, self.x, weight, self.bias, scale) for weight, scale in weights])

    def in_bf16(self) -> Operands:
        """The same product with weights of 16 bits."""
        weights = [
            weight if scale is None else dequantize(weight, scale, torch.bfloat16)
            for weight, scale in zip(self.weights, self.scales, strict=True)
        ]
        return Operands(self.x, weights, self.bias, [None] * len(weights))

    @property
    def num_bytes(self) -> int:
        """Read and written by one product."""
        n = self.weights[0].shape[0]
        return self.weights[0].nbytes + 2 * (self.x.numel() + len(self.x) * n)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = torch.empty_like(weight, dtype=FLOAT8), weight.new_empty(len(weight), dtype=torch.float32)
    quantize_rows(weight, values, scale)
    return values, scale


def _cublas(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, _: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, weight, bias)


def tune(case: Case) -> list[tuple[float, Config | None]]:
    """(microseconds, configuration) of every candidate that runs, cuBLAS (None) among them, best first."""
    operands, linear = Operands.of(case), SmallLinear(torch.device("cuda"))
    results: list[tuple[float, Config | None]] = [(operands.in_bf16().us(_cublas), None)]
    for config in case.candidates():

        def product(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            scale: torch.Tensor | None,
            config: Config = config,
        ) -> torch.Tensor:
            return linear.run(x, weight, bias, config, scale)

        try:
            results.append((operands.us(product), config))
        except OutOfResources:
            continue
    return sorted(results, key=lambda result: result[0])


def compile_candidates(cases: Iterable[Case]) -> None:
    """Fill Triton's cache on disk from several processes: one alone would compile for minutes."""
    jobs = [(case, config) for case in cases for config in case.candidates()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        list(pool.map(_compile, jobs, chunksize=4))


def _compile(job: tuple[Case, Config]) -> None:
    case, config = job
    operands = Operands.of(case, cold=False)
    linear = SmallLinear(torch.device("cuda"))
    try:
        linear.run(operands.x, operands.weights[0], operands.bias, config, operands.scales[0])
    except OutOfResources:
        return
    torch.cuda.synchronize()


def print_tuning(float8: bool) -> None:
    """Rows for linear_small.TABLE or FLOAT8_TABLE, with what they were measured to take."""
    shapes = _shapes(float8).values()
    cases = [Case(rows, *shape, float8) for shape in shapes for rows in ROW_CLASSES]
    compile_candidates(cases)
    for case in cases:
        results = tune(case)
        cublas = next(us for us, config in results if config is None)
        if float8:
            results = [result for result in results if result[1] is not None]
        best_us, best = results[0]
        following = ", ".join(f"{us:.1f} {config}" for us, config in results[1:3])
        print(
            f"    ({case.rows}, {case.n}, {case.k}): {best},  # {best_us:.1f} us, cuBLAS {cublas:.1f}; "
            f"next: {following}",
            flush=True,
        )


def _shapes(float8: bool) -> dict[str, tuple[int, int, bool]]:
    """The output matrix is never in float8."""
    return {name: shape for name, shape in SHAPES.items() if not (float8 and name == "lm_head")}


def print_products(float8: bool) -> None:
    """Every matrix alone."""
    device = torch.device("cuda")
    linear, early = TritonOps(device).linear, TritonOps(device, overlap=True).linear
    print(f"{'product':10}{'rows':>5}{'us':>9}{'GB/s':>7}{'of read':>9}{'early us':>10}{'cuBLAS us':>11}  by")
    for name, (n, k, with_bias) in _shapes(float8).items():
        for rows in (*ROWS, *(PREFILL_ROWS if float8 else ())):
            case = Case(rows, n, k, with_bias, float8)
            operands = Operands.of(case)
            us, early_us = (operands.us(product) for product in (linear, early))
            cublas = operands.in_bf16().us(_cublas)
            rate = operands.num_bytes / us / 1e3
            print(
                f"{name:10}{rows:5}{us:9.1f}{rate:7.0f}{rate / READ_GB_S:9.2f}{early_us:10.1f}{cublas:11.1f}"
                f"  {case.by()}",
                flush=True,
            )


def print_fused(float8: bool) -> None:
    """The kernels between the products, by Triton and by PyTorch."""
    ours = TritonOps(torch.device("cuda"))
    print(f"{'kernel':16}{'rows':>6}{'us':>9}{'GB/s':>7}{'PyTorch us':>12}")
    for rows in (*ROWS, 2668, 8192):
        for name, num_bytes, call in _fused_calls(rows):
            us, torch_us = (graph_us([partial(call, ops)] * 16) for ops in (ours, TORCH_OPS))
            print(f"{name:16}{rows:6}{us:9.1f}{num_bytes / us / 1e3:7.0f}{torch_us:12.1f}", flush=True)
        for size in (MODEL.hidden_size, MODEL.intermediate_size) if float8 else ():
            x = _random(rows, size)
            us, torch_us = (graph_us([partial(call, x)] * 16) for call in (quantize, _quantized))
            name, rate = f"quantize {size}", 3 * x.numel() / us / 1e3
            print(f"{name:16}{rows:6}{us:9.1f}{rate:7.0f}{torch_us:12.1f}", flush=True)


def _fused_calls(rows: int) -> list[tuple[str, int, Callable[[Ops], object]]]:
    """(name, bytes read and written, call)."""
    size, inner, eps = MODEL.hidden_size, MODEL.intermediate_size, MODEL.rms_norm_eps
    hidden, residual, weight = _random(rows, size), _random(rows, size), _random(size)
    gate_up, qkv = _random(rows, 2 * inner), _random(rows, SHAPES["qkv"][0])
    device = torch.device("cuda")
    table = RotaryTable(MODEL.rope, MODEL.head_dim, MODEL.max_position_embeddings, torch.bfloat16, device)
    positions = torch.arange(rows, device=device)
    cache = LayerCache(*(_random(rows // 16 + 1, 16, MODEL.num_kv_heads, MODEL.head_dim) for _ in range(2)))
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
        logits = _random(rows, MODEL.vocab_size)
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
    decoder = Decoder(MODEL, TensorParallel(), backend, torch.bfloat16, device, float8)
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
            inputs = {width: _random(rows, width) for width in (MODEL.hidden_size, MODEL.intermediate_size)}
            for ops in kinds.values():
                decoder.use_ops(ops)
                row += f"{graph_us([partial(run, decoder, cache, inputs)]) / 1e3:18.3f}"
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
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--only", choices=("products", "fused", "model"), help="print this part alone")
    options = parser.parse_args()
    float8 = options.weights == "fp8"
    with torch.inference_mode():
        if options.tune:
            print_tuning(float8)
            return
        for part, show in (("products", print_products), ("fused", print_fused), ("model", print_model)):
            if options.only in (None, part):
                show(float8)


if __name__ == "__main__":
    main()
