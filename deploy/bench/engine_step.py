"""The engine's decode step on a GPU, part by part: `python -m deploy.bench.engine_step FOLDER`.

FOLDER needs config and tokenizer only: weights are random ones made on the device.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import torch

from llm_service.config import EngineConfig
from llm_service.engine import Engine
from llm_service.engine_process import EngineSettings, Rank, build_engine
from llm_service.sampling_params import SamplingParams
from llm_service.sequence import QueueRank, SequenceGroup
from llm_service.stopwatch import READ_BYTES_PER_S
from protos.checkpoint import open_checkpoint

NUM_PROMPT_TOKENS = 151
NUM_STEPS = 200
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "penalties": SamplingParams(temperature=0.0, presence_penalty=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--samplings", default="greedy", help=f"some of {','.join(SAMPLINGS)}")
    parser.add_argument("--cuda-graphs", default="auto")
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO")
    config = EngineConfig(
        load_format="dummy",
        max_model_len=4096,
        cuda_graphs=arguments.cuda_graphs,
        quantization=arguments.quantization,
    )
    checkpoint = open_checkpoint(arguments.folder)
    rank = Rank(EngineSettings(arguments.folder, config, 0, "", "", "", "INFO"), checkpoint)
    rank.rehearse()
    capacity = rank.plan_capacity(checkpoint)
    launcher = rank.cuda_launcher(capacity, rank.create_memory(capacity))
    weights = sum(parameter.nbytes for parameter in rank.decoder.parameters())
    embedding = rank.decoder.embedding.weight.nbytes
    floor = (weights - embedding) / READ_BYTES_PER_S * 1e3
    print(f"weights that a step reads: {(weights - embedding) / 1e9:.2f} GB, {floor:.2f} ms")
    print("sampling      batch  overlap  ms a step  floor/step  launch ms  collect ms (waiting included)")
    for sampling in arguments.samplings.split(","):
        for batch in map(int, arguments.batches.split(",")):
            for overlap in (False, True):
                engine = build_engine(rank.config, capacity, rank.backend.block_size, launcher, overlap)
                step, launch, collect = _measure(engine, batch, SAMPLINGS[sampling])
                print(
                    f"{sampling:12} {batch:6} {overlap!s:>8} {step:10.3f} {floor / step:11.2f} "
                    f"{launch:10.3f} {collect:11.3f}"
                )


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
