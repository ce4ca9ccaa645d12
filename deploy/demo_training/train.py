"""Train the demo model: `python -m deploy.demo_training.train --help`.

A run takes a folder with a checkpoint (with weights, or a fresh one without), trains for a given time and
writes the checkpoint again; the next run goes on from those weights. Progress runs from 0 to 1 over all
runs together and moves difficulty and learning rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from deploy.demo_training.batches import Batches, BatchMaker
from deploy.demo_training.conversation import Encoder
from deploy.demo_training.feed import Feed
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.trainer import Run, Trainer
from llm_service.prompt import PromptBuilder
from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import Checkpoint, CheckpointFormat
from protos.preprocessing import Preprocessing

SEED = 20261120


def make_encoder(folder: Path) -> Encoder:
    """The services' own prompt and tiling for a checkpoint that may have no weights yet."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(folder, config, CheckpointFormat.CHAT, {})
    tokenizer = load_tokenizer(folder)
    builder = PromptBuilder.from_checkpoint(checkpoint, tokenizer)
    return Encoder(Preprocessing.from_checkpoint(checkpoint), tokenizer, builder)


def run_training(run: Run, fonts: FontShelf) -> None:
    """Train for one run's share and save."""
    progress = multiprocessing.get_context("fork").Value("d", run.first)
    maker = BatchMaker(make_encoder(run.checkpoint), fonts, run.num_tiles)
    on_gpu = torch.cuda.is_available()
    loader = DataLoader(
        Batches(maker, progress, run.seed + round(run.first * 1000)),
        batch_size=None,
        num_workers=run.num_workers,
        pin_memory=on_gpu,
        multiprocessing_context="fork" if run.num_workers else None,
    )
    batches = iter(loader)  # the workers fork here, before anything touches the GPU
    device = torch.device("cuda" if on_gpu else "cpu")
    trainer = Trainer(run, device)
    run.output.mkdir(parents=True, exist_ok=True)
    with (run.output / "log.jsonl").open("a", encoding="utf-8") as log:
        trainer.train(Feed(batches, device, run.num_kept, run.seed), progress, log)
    trainer.save()


def main(argv: Sequence[str] | None = None) -> int:
    run = parse(argv)
    run_training(run, FontShelf.find("training", run.fonts))
    print(f"saved {run.output}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> Run:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo_training.train", description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder with config and tokenizer, and weights to go on from")
    add("--output", type=Path, required=True, help="folder for the trained checkpoint and log.jsonl")
    add("--seconds", type=float, default=520.0, help="length of this run (default: %(default)s)")
    add("--max-steps", type=int, default=10**9, help="end after so many steps")
    add("--first", type=float, default=0.0, help="progress at the start (default: %(default)s)")
    add("--last", type=float, default=1.0, help="progress at the end (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="of fresh weights and of the samples (default: %(default)s)")
    add("--num-tiles", type=int, default=840, help="tiles of a micro-batch (default: %(default)s)")
    add("--num-micro", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    add(
        "--num-workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="processes that make samples",
    )
    add(
        "--num-kept",
        type=int,
        default=160,
        help="micro-batches kept for training again (default: %(default)s)",
    )
    add("--fonts", type=Path, action="append", default=[], help="further folder with fonts")
    add("--log-every", type=int, default=100, help="steps between lines of the log (default: %(default)s)")
    add("--no-compile", dest="compile", action="store_false", help="run the layers as they are")
    values = vars(parser.parse_args(argv))
    return Run(**values | {"fonts": tuple(values["fonts"])})


if __name__ == "__main__":
    raise SystemExit(main())
