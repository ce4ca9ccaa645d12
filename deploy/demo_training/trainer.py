"""One run of training on one device: steps for a given time, then the checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TextIO

import torch

from deploy.demo_training.checkpoint_files import read_shape, read_weights, write_weights
from deploy.demo_training.feed import Feed
from deploy.demo_training.model import DemoModel, initialise
from deploy.demo_training.optimizer import MasterOptimizer
from deploy.demo_training.scores import Tally, score
from encoder_service.tiling import normalize
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD

MARK_WEIGHT = 0.3  # of the training-only head's loss at the start; falls to zero with progress
NOISE = 0.12  # of a normalised pixel


@dataclass(frozen=True)
class Run:
    """One run's share of the training."""

    checkpoint: Path
    output: Path
    seconds: float
    max_steps: int
    first: float  # progress at the start
    last: float  # progress at the end
    seed: int
    num_tiles: int  # of a micro-batch
    num_micro: int  # micro-batches of a step
    num_workers: int
    num_kept: int  # micro-batches to train on again while the workers are behind
    fonts: tuple[Path, ...]
    log_every: int
    compile: bool


class Trainer:
    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._dtype = torch.bfloat16
        self._model = load_model(run.checkpoint, run.seed).to(device, self._dtype)
        self._optimizer = MasterOptimizer(self._model)
        if run.compile:
            for part in self._model.compiled_parts():
                part.compile(dynamic=True)

    def train(self, feed: Feed, shared_progress: Synchronized[float], log: TextIO) -> None:
        """Step until the time or the steps are over."""
        run, start = self._run, time.perf_counter()
        tally, logged = Tally(), start
        for step in range(1, run.max_steps + 1):
            share = max((time.perf_counter() - start) / run.seconds, (step - 1) / run.max_steps)
            if share >= 1:
                break
            progress = run.first + (run.last - run.first) * share
            shared_progress.value = progress
            self._step(feed, progress, tally)
            if step % run.log_every == 0:
                now = time.perf_counter()
                line = {"step": step, "seconds": round(now - start), "progress": round(progress, 4)}
                print(json.dumps(line | tally.line(now - logged)), file=log, flush=True)
                tally, logged = Tally(), now

    def _step(self, feed: Feed, progress: float, tally: Tally) -> None:
        mark_weight = MARK_WEIGHT * (1 - progress)
        seen, scores = feed.num_fresh, []
        for _ in range(self._run.num_micro):
            batch = feed.take()
            tally.rows += len(batch.ids)
            tally.tiles += len(batch.tiles)
            pixels = noisy(normalize(batch.tiles, IMAGENET_MEAN, IMAGENET_STD, self._dtype))
            scored = score(self._model, batch, pixels)
            ((scored.loss + mark_weight * scored.mark_loss) / self._run.num_micro).backward()
            scores.append(scored)
        tally.norm += self._optimizer.step(progress)
        for scored in scores:
            tally.add(scored)
        tally.steps += 1
        tally.micro += len(scores)
        tally.fresh += feed.num_fresh - seen

    def save(self) -> None:
        """The checkpoint, without the head that only training needs."""
        self._run.output.mkdir(parents=True, exist_ok=True)
        for file in self._run.checkpoint.glob("*.json"):
            if self._run.checkpoint.resolve() != self._run.output.resolve():
                shutil.copy(file, self._run.output)
        write_weights(self._run.output, self._model.checkpoint_tensors())


def load_model(folder: Path, seed: int) -> DemoModel:
    """Fresh weights, or those of the folder."""
    model = DemoModel(read_shape(folder))
    initialise(model, seed)
    tensors = read_weights(folder)
    if tensors:
        heads = {name for name in model.state_dict() if name.startswith("mark_head.")}
        missing = set(model.load_state_dict(tensors, strict=False).missing_keys) - heads
        assert not missing, missing
    return model


def noisy(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised tiles under Gaussian noise of up to about 7 of 255, none on half of them."""
    share = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device)
    strength = NOISE * share[0] * (share[1] < 0.5)
    return pixels + strength.to(pixels.dtype) * torch.randn_like(pixels)
