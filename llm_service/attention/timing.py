"""Times the CUDA backends against what memory allows: `python -m llm_service.attention.timing`.

Needs a CUDA device; flash-attn is timed where it is installed.  `--compare` times a few cases, one backend
beside the other; `--sweep` also times other ways to cut the work, to choose the defaults by.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from itertools import accumulate, product

import torch

from llm_service.attention.base import AttentionBackend, AttentionMetadata
from llm_service.attention.cuda import BLOCK_SIZE, CudaBackend
from llm_service.attention.flash import FlashBackend, FlashKernels
from llm_service.attention.triton_decode import DecodeTiling, new_counters, paged_decode
from llm_service.attention.triton_prefill import TILE_FIELDS, Tiling, cut_tiles, paged_prefill
from llm_service.kv_cache import LayerCache
from llm_service.stopwatch import READ_BYTES_PER_S, seconds_or_none

# Qwen2.5-7B, the language model of InternVL3-8B.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128
DTYPE = torch.bfloat16
REPEATS = 20
L2_BYTES = 60e6
DECODES = tuple(product((1, 64, 256), (400, 1024, 3600)))
# name -> query_len and context_len of each sequence
PREFILLS = {
    "1x8192": [(8192, 8192)],
    "4x3400": [(3400, 3400)] * 4,
    "1x2612": [(2612, 2612)],
    "16x1024": [(1024, 1024)] * 16,
    "2048 after 0": [(2048, 2048)],
    "2048 after 2048": [(2048, 4096)],
    "2048 after 6144": [(2048, 8192)],
    "64x151": [(151, 151)] * 64,
    "17 after 4000": [(17, 4017)],
}
COMPARED_DECODES = ((1, 3600), (64, 400), (64, 3600))
COMPARED_PREFILLS = ("2048 after 0", "1x8192", "2048 after 6144", "16x1024", "64x151")
DECODE_SWEEP = [
    DecodeTiling(block_n, num_warps, num_stages, target)
    for block_n, num_warps, num_stages, target in product((32, 64, 128), (4, 8), (2, 3, 4), (512, 1024, 2048))
]
PREFILL_SWEEP = [
    (tile, Tiling(block_n, num_warps, num_stages))
    for tile, block_n, num_warps, num_stages in product((64, 128), (64, 128), (4, 8), (2, 3, 4))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", action="store_true", help="time a few cases only")
    parser.add_argument("--sweep", action="store_true", help="time other tilings too")
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    )
    prefill_backends, decode_backends = new_backends()
    for batch, context_len in COMPARED_DECODES if args.compare else DECODES:
        for kernel, backend in decode_backends.items():
            time_backend_decode(batch, context_len, kernel, backend)
    for name in COMPARED_PREFILLS if args.compare else PREFILLS:
        for kernel, backend in prefill_backends.items():
            time_prefill(name, kernel, backend)
    if args.sweep:
        for batch, context_len in ((1, 400), (1, 3600), (64, 400), (64, 3600), (256, 400)):
            time_tilings(batch, context_len)
        for name in ("1x8192", "4x3400", "2048 after 6144", "64x151"):
            time_tiles(name)


def new_backends() -> tuple[dict[str, AttentionBackend], dict[str, AttentionBackend]]:
    """By the kernel that they show: for prompts and chunks, and for decodes."""
    device = torch.device("cuda")
    triton, cudnn = CudaBackend(device), CudaBackend(device)
    # Only what is warmed up uses cuDNN.
    cudnn.warm_up(NUM_HEADS, new_cache(1024, BLOCK_SIZE), 8192)
    prefill: dict[str, AttentionBackend] = {"triton": triton, "cudnn": cudnn}
    decode: dict[str, AttentionBackend] = {"triton": triton}
    if find_spec("flash_attn") is not None:
        prefill["flash-attn"] = decode["flash-attn"] = FlashBackend(FlashKernels.installed())
    return prefill, decode


class Decodes:
    """Sequences of one length on shuffled blocks, in as many layers as it takes to read memory, not L2."""

    def __init__(self, batch: int, context_len: int, block_size: int) -> None:
        width = -(-context_len // block_size)
        self.num_bytes = 2 * batch * context_len * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
        num_layers = min(max(int(4 * L2_BYTES / self.num_bytes), 2), 28)
        self.caches = [new_cache(batch * width, block_size) for _ in range(num_layers)]
        self.tables = torch.randperm(batch * width, device="cuda").view(batch, width).int()
        self.lens = torch.full((batch,), context_len, dtype=torch.int32, device="cuda")
        self.query = torch.randn(batch, NUM_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        self._case = f"decode b{batch:<4} ctx {context_len:<5}"

    def print(self, seconds: float, used: object) -> None:
        """`seconds` of one layer."""
        rate, floor = self.num_bytes / seconds / 1e9, self.num_bytes / READ_BYTES_PER_S * 1e6
        print(
            f"{self._case} {seconds * 1e6:8.1f} us {rate:6.0f} GB/s  floor {floor:7.1f} us  {used}",
            flush=True,
        )


def time_backend_decode(batch: int, context_len: int, kernel: str, backend: AttentionBackend) -> None:
    """Print the time of one layer and its bytes a second, replayed as a graph like in serving."""
    step = Decodes(batch, context_len, backend.block_size)
    slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
    plan = backend.plan_decode(slots, step.tables, step.lens)

    def layers() -> None:
        for cache in step.caches:
            backend.attend(step.query, step.query, step.query, cache, plan)

    seconds = seconds_or_none([layers], repeats=REPEATS)
    if seconds is not None:
        step.print(seconds / len(step.caches), kernel)


def time_tilings(batch: int, context_len: int) -> None:
    """Print the fastest ways to cut a batch of decodes for the Triton kernel."""
    step = Decodes(batch, context_len, BLOCK_SIZE)
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    output, counters = torch.empty_like(step.query), new_counters(step.query.device)
    lines = []
    for tiling in DECODE_SWEEP:

        def layers(tiling: DecodeTiling = tiling) -> None:
            for cache in step.caches:
                paged_decode(step.query, cache, rows, step.tables, step.lens, output, counters, tiling)

        if (seconds := seconds_or_none([layers], repeats=REPEATS)) is not None:
            lines.append((seconds / len(step.caches), tiling))
    for seconds, used in sorted(lines, key=lambda line: line[0])[:8]:
        step.print(seconds, used)


def time_prefill(name: str, kernel: str, backend: AttentionBackend) -> None:
    """Print the time and rate of a step's attention in one layer, as the backend runs it."""
    metadata, cache, query, key, value = prefill_step(name, backend.block_size)
    plan = backend.plan(metadata, query.device)
    if kernel == "cudnn" and not plan.prompts:
        return
    seconds = seconds_or_none([lambda: backend.attend(query, key, value, cache, plan)], False, REPEATS)
    print_prefill(name, kernel, seconds)


def time_tiles(name: str) -> None:
    """Print the fastest ways to cut a step for the Triton kernel."""
    metadata, cache, query, _, _ = prefill_step(name, BLOCK_SIZE)
    starts = list(accumulate(metadata.query_lens, initial=0))[:-1]
    tables = torch.tensor(metadata.block_tables, dtype=torch.int32, device="cuda")
    output = torch.empty(query.shape, dtype=DTYPE, device="cuda")
    lines = []
    for tile, tiling in PREFILL_SWEEP:
        records = torch.tensor(cut_tiles(starts, metadata.query_lens, metadata.context_lens, tile))
        tiles = records.int().view(-1, TILE_FIELDS).cuda()

        def attend(tiles: torch.Tensor = tiles, tile: int = tile, tiling: Tiling = tiling) -> None:
            paged_prefill(query, cache, tiles, tables, output, tile, tiling)

        if (seconds := seconds_or_none([attend], False, REPEATS)) is not None:
            lines.append((seconds, f"tile {tile} {tiling}"))
    for seconds, used in sorted(lines)[:6]:
        print_prefill(name, used, seconds)


def print_prefill(name: str, kernel: str, seconds: float | None) -> None:
    pairs = sum(query * (context - query) + query * (query + 1) / 2 for query, context in PREFILLS[name])
    if seconds is not None:
        rate = 4 * NUM_HEADS * HEAD_DIM * pairs / seconds / 1e12
        print(f"prefill {name:<16} {seconds * 1e6:8.1f} us {rate:5.0f} TFLOP/s  {kernel}", flush=True)


def prefill_step(
    name: str, block_size: int
) -> tuple[AttentionMetadata, LayerCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Metadata, cache, query, key and value of the named step, on shuffled blocks."""
    query_lens, context_lens = ([pair[i] for pair in PREFILLS[name]] for i in (0, 1))
    width = -(-max(context_lens) // block_size)
    tables = torch.randperm(len(query_lens) * width).view(-1, width).tolist()
    num_tokens = sum(query_lens)
    metadata = AttentionMetadata(query_lens, context_lens, tables, torch.zeros(num_tokens, dtype=torch.int64))
    qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    query, key, value = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    return metadata, new_cache(len(query_lens) * width, block_size), query, key, value


def new_cache(num_blocks: int, block_size: int) -> LayerCache:
    """Random numbers: zeros would run faster than what is real."""
    key = torch.randn(num_blocks, block_size, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    return LayerCache(key, torch.randn_like(key))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
