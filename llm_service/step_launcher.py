"""Launch a step, collect its tokens: what the engine asks of whoever computes, and the synchronous answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import torch

from llm_service.messages import StepInput
from llm_service.sampled_tokens import SampledToken
from llm_service.sampler import Sampler
from llm_service.sampler_row import SamplerRow


class PendingStep(Protocol):
    """A step that was launched."""

    def is_ready(self) -> bool:
        """Whether `collect` would return at once."""

    def collect(self) -> list[SampledToken]:
        """Wait for the step; a token for each of its `logits_positions`.  Raises what the step raised."""


class StepLauncher(Protocol):
    """Steps run in the order of their launches; each may use what the one before sampled."""

    device: torch.device

    def launch(self, step: StepInput, rows: Sequence[SamplerRow]) -> PendingStep:
        """`rows` say how each of the step's `logits_positions` is sampled."""


class Runner(Protocol):
    """Sequences as numbers in, logits out: a ModelRunner, or several of them in parallel."""

    def forward(self, step: StepInput) -> torch.Tensor: ...  # [len(logits_positions), vocab_size] float32


class FinishedStep:
    def __init__(self, tokens: list[SampledToken]) -> None:
        self._tokens = tokens

    def is_ready(self) -> bool:
        return True

    def collect(self) -> list[SampledToken]:
        return self._tokens


class SynchronousLauncher:
    """Computes a step while it is launched: for the CPU, and for ranks that share a model."""

    def __init__(self, runner: Runner, sampler: Sampler, device: torch.device) -> None:
        self.device = device
        self._runner = runner
        self._sampler = sampler
        self._last: list[SampledToken] = []

    def launch(self, step: StepInput, rows: Sequence[SamplerRow]) -> PendingStep:
        """See StepLauncher.launch."""
        if min(step.token_ids) < 0:
            known = [self._last[-1 - i].token_id if i < 0 else i for i in step.token_ids]
            step = msgspec.structs.replace(step, token_ids=known)
        logits = self._runner.forward(step)
        self._last = self._sampler.sample(logits, rows) if rows else []
        return FinishedStep(self._last)
