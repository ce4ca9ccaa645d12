"""How right the answers of a micro-batch are, task by task, and sums of that for the log."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from deploy.demo_training.batches import TASKS, Batch
from deploy.demo_training.model import NO_MARK, DemoModel


@dataclass(frozen=True)
class Scores:
    loss: torch.Tensor
    mark_loss: torch.Tensor
    by_task: torch.Tensor  # [4, number of tasks]: answer tokens, sums of their losses, answers, right answers


def score(model: DemoModel, batch: Batch, pixels: torch.Tensor) -> Scores:
    """Cross-entropy of the answers' tokens; an answer is right if every token is the likeliest one.

    With the right tokens given, all being likeliest is the same as greedy decoding giving the answer.
    """
    output = model(pixels, batch.ids, batch.visual, batch.wanted)
    losses = F.cross_entropy(output.logits.float(), batch.targets, reduction="none")
    marks = output.mark_logits.flatten(0, 1).float()
    labels = batch.marks.flatten().long()
    mark_loss = F.cross_entropy(marks, labels, ignore_index=NO_MARK, reduction="sum")
    mark_loss = mark_loss / (labels != NO_MARK).sum().clamp(min=1)
    hits = output.logits.argmax(-1) == batch.targets
    num_answers = batch.num_answers
    wrong = torch.zeros(num_answers, device=hits.device).index_add_(0, batch.answers, (~hits).float())
    task_of = torch.zeros(num_answers, dtype=torch.int64, device=hits.device)
    task_of.index_copy_(0, batch.answers, batch.tasks)
    ones = torch.ones_like(losses)
    by_task = torch.stack(
        [
            count_by_task(ones, batch.tasks),
            count_by_task(losses.detach(), batch.tasks),
            count_by_task(torch.ones_like(wrong), task_of),
            count_by_task(wrong == 0, task_of),
        ]
    )
    return Scores(losses.mean(), mark_loss, by_task)


def count_by_task(values: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """Sum of `values` by the task of each; [number of tasks]."""
    return torch.zeros(len(TASKS), device=values.device).index_add_(0, tasks, values.float())


@dataclass
class Tally:
    """Sums since the last log line."""

    steps: int = 0
    micro: int = 0
    rows: int = 0
    tiles: int = 0
    fresh: int = 0
    mark_loss: float = 0.0
    norm: float = 0.0
    tokens: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    losses: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    answers: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    right: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, scores: Scores) -> None:
        self.mark_loss += float(scores.mark_loss.detach())
        sums = scores.by_task.tolist()
        for name, row in zip(("tokens", "losses", "answers", "right"), sums, strict=True):
            for task, value in zip(TASKS, row, strict=True):
                getattr(self, name)[task] += value

    def line(self, elapsed_s: float) -> dict[str, Any]:
        tasks = {
            task: {
                "loss": round(self.losses[task] / self.tokens[task], 4),
                "exact": round(self.right[task] / self.answers[task], 4),
                "answers": int(self.answers[task]),
            }
            for task in TASKS
            if self.answers[task]
        }
        return {
            "samples_per_s": round(self.rows / elapsed_s),
            "tiles_per_s": round(self.tiles / elapsed_s),
            "steps_per_s": round(self.steps / elapsed_s, 2),
            "fresh": round(self.fresh / max(1, self.micro), 3),
            "norm": round(self.norm / max(1, self.steps), 3),
            "mark_loss": round(self.mark_loss / max(1, self.micro), 4),
            "loss": round(sum(self.losses.values()) / max(1.0, sum(self.tokens.values())), 4),
            "tasks": tasks,
        }
