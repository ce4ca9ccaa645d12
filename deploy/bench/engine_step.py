"""The engine's steps on a GPU without services: decodes part by part, whole prompts, and what share of the
chip's rates they reach.  `python -m deploy.bench.engine_step [FOLDER] [--quantization fp8] [--json FILE]`.

FOLDER needs config and tokenizer only (default: the InternVL3-8B shape): weights are random ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deploy.bench.shapes import write_shape
from llm_service.capacity import Capacity
from llm_service.config import QUANTIZATIONS, EngineConfig
from llm_service.cuda_launcher import CudaLauncher
from llm_service.engine import Engine
from llm_service.engine_process import EngineSettings, Rank, build_engine
from llm_service.model.config import DecoderConfig
from llm_service.sampling_params import SamplingParams
from llm_service.sequence import QueueRank, SequenceGroup
from llm_service.stopwatch import BF16_FLOP_PER_S, READ_BYTES_PER_S
from protos.checkpoint import open_checkpoint

NUM_PROMPT_TOKENS = 151
NUM_STEPS = 200
NUM_PREFILLS = 7
MAX_PREFILL_TOKENS = 8192
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "penalties": SamplingParams(temperature=0.0, presence_penalty=0.5),
}


class Bench:
    """One loaded model.  Engines come and go, the launcher with its graphs and caches stays."""

    def __init__(self, folder: str, config: EngineConfig) -> None:
        checkpoint = open_checkpoint(folder)
        self.rank = Rank(EngineSettings(folder, config, 0, "", "", "", "INFO"), checkpoint)
        self.rank.rehearse()
        self._capacity: Capacity = self.rank.plan_capacity(checkpoint)
        memory = self.rank.create_memory(self._capacity)
        self._launcher: CudaLauncher = self.rank.cuda_launcher(self._capacity, memory)

    @property
    def step_bytes(self) -> int:
        """Of weights, that a decode step reads."""
        weights = sum(parameter.nbytes for parameter in self.rank.decoder.parameters())
        return int(weights - self.rank.decoder.embedding.weight.nbytes)

    def engine(self, overlap: bool) -> Engine:
        block_size = self.rank.backend.block_size
        return build_engine(self.rank.config, self._capacity, block_size, self._launcher, overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--prefills", default="151,2669,8192", help=f"tokens, at most {MAX_PREFILL_TOKENS}")
    parser.add_argument("--samplings", default="greedy", help=f"some of {','.join(SAMPLINGS)}")
    parser.add_argument("--cuda-graphs", default="auto")
    parser.add_argument("--quantization", default="none", choices=QUANTIZATIONS)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO")
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
        folder = arguments.folder or str(write_shape(Path(scratch) / "internvl3-8b"))
        bench = Bench(folder, _config(arguments))
    figures: dict[str, Any] = {"quantization": arguments.quantization, "weight_bytes": bench.step_bytes}
    figures["prefill"] = _prefills(bench, [int(tokens) for tokens in arguments.prefills.split(",") if tokens])
    batches = [int(batch) for batch in arguments.batches.split(",") if batch]
    figures["decode"] = _decodes(bench, batches, arguments.samplings.split(","))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        load_format="dummy",
        max_model_len=MAX_PREFILL_TOKENS + 512,
        max_num_batched_tokens=MAX_PREFILL_TOKENS,
        enable_prefix_caching=False,
        cuda_graphs=arguments.cuda_graphs,
        quantization=arguments.quantization,
    )


def prefill_flop(model: DecoderConfig, num_tokens: int) -> float:
    """Of a whole prompt: layers' products and causal attention; of the output matrix one row."""
    size, heads = model.hidden_size, model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    layer = size * (heads + 2 * kv_heads) + heads * size + 3 * size * model.intermediate_size
    pairs = num_tokens * (num_tokens + 1) / 2
    return model.num_layers * (2 * layer * num_tokens + 4 * heads * pairs) + 2 * size * model.vocab_size


def _prefills(bench: Bench, lengths: list[int]) -> dict[str, dict[str, float]]:
    """By number of tokens: one prompt in one step, to its sampled token on the host."""
    figures = {}
    print("prefill: tokens        ms  TFLOP/s  of bf16's peak")
    for num_tokens in lengths:
        engine = bench.engine(overlap=False)
        times = [_prefill_s(engine, index, num_tokens) for index in range(NUM_PREFILLS + 1)]
        seconds = statistics.median(times[1:])
        rate = prefill_flop(bench.rank.model_config, num_tokens) / seconds
        share = rate / BF16_FLOP_PER_S
        print(f"{num_tokens:15} {seconds * 1e3:9.2f} {rate / 1e12:8.0f} {share:14.1%}", flush=True)
        figures[str(num_tokens)] = {
            "ms": round(seconds * 1e3, 3),
            "tflop_s": round(rate / 1e12, 1),
            "peak_share": round(share, 4),
        }
    return figures


def _prefill_s(engine: Engine, index: int, num_tokens: int) -> float:
    prompt = [(7 * index + 11 * place) % 1000 for place in range(num_tokens)]
    rank, params = QueueRank(0, index), SAMPLINGS["greedy"]
    engine.add(SequenceGroup(index, rank, prompt, (), params, frozenset(), 1))
    start = time.perf_counter()
    while not engine.step().progress:  # that is, until its token is on the host
        pass
    seconds = time.perf_counter() - start
    engine.close(index)
    while engine.has_work:
        engine.step()
    return seconds


def _decodes(bench: Bench, batches: list[int], samplings: list[str]) -> dict[str, dict[str, float]]:
    """By batch size, of the first sampling, with steps overlapped as in serving."""
    floor = bench.step_bytes / READ_BYTES_PER_S * 1e3
    print(f"weights that a step reads: {bench.step_bytes / 1e9:.2f} GB, {floor:.2f} ms")
    print("sampling      batch  overlap  ms a step  floor/step  launch ms  collect ms (waiting included)")
    figures = {}
    for sampling in samplings:
        for batch in batches:
            for overlap in (False, True):
                step, launch, collect = _measure(bench.engine(overlap), batch, SAMPLINGS[sampling])
                print(
                    f"{sampling:12} {batch:6} {overlap!s:>8} {step:10.3f} {floor / step:11.2f} "
                    f"{launch:10.3f} {collect:11.3f}",
                    flush=True,
                )
                if overlap and sampling == samplings[0]:
                    figures[str(batch)] = {"ms": round(step, 3), "read_share": round(floor / step, 4)}
    return figures


def _measure(engine: Engine, batch: int, params: SamplingParams) -> tuple[float, float, float]:
    """Medians in ms of steps in which all sequences decode: whole, launching, collecting."""
    for index in range(batch):
        prompt = [(7 * index + place) % 1000 for place in range(NUM_PROMPT_TOKENS)]
        max_tokens = NUM_STEPS + 100
        rank = QueueRank(0, index)
        engine.add(SequenceGroup(index, rank, prompt, (), params, frozenset(), max_tokens))
    while engine.scheduler.waiting or not all(s.is_decoding for s in engine.scheduler.running):
        engine.step()
    for _ in range(20):
        engine.step()
    times: list[tuple[float, float, float]] = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        engine.launch()
        launched = time.perf_counter()
        engine.collect()
        end = time.perf_counter()
        times.append((end - start, launched - start, end - launched))
    for index in range(batch):
        engine.close(index)
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    step, launch, collect = (statistics.median(values) * 1e3 for values in zip(*times, strict=True))
    return step, launch, collect


if __name__ == "__main__":
    main()
