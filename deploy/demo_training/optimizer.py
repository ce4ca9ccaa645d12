"""bfloat16 weights trained through fp32 masters: Muon for the layers' matrices, AdamW for the rest."""

from __future__ import annotations

import torch

from deploy.demo_training.model import DemoModel

LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
DECAY_FROM = 0.35  # share of the training from which the rate falls towards zero
MAX_GRADIENT_NORM = 1.0


class MasterOptimizer:
    """The model computes at the dtype it is served at; updates smaller than its rounding add up in fp32.

    Muon (Jordan 2024, as torch has it) orthogonalises updates of matrices; its rate is matched to AdamW's.
    """

    def __init__(self, model: DemoModel) -> None:
        self._live: list[torch.Tensor] = list(model.parameters())
        self._masters = [parameter.detach().float().requires_grad_() for parameter in self._live]
        names = [name for name, _ in model.named_parameters()]
        matrices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, master in zip(names, self._masters, strict=True):
            (matrices if master.dim() == 2 and _is_hidden(name) else others).append(master)
        on_gpu = self._masters[0].is_cuda
        self._optimizers = (
            torch.optim.Muon(matrices, LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu),
        )
        self._num_steps = 0

    def step(self, progress: float) -> float:
        """Apply the gradients the model has gathered and clear them; returns their norm before clipping."""
        for master, live in zip(self._masters, self._live, strict=True):
            master.grad = torch.zeros_like(master) if live.grad is None else live.grad.float()
            live.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRADIENT_NORM)
        self._num_steps += 1
        rate = learning_rate(progress, self._num_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._live, self._masters)
        return float(norm)


def learning_rate(progress: float, num_steps: int) -> float:
    """Constant, then a line down to a hundredth; every run warms up, since it starts without momentum."""
    decayed = min(1.0, (1 - progress) / (1 - DECAY_FROM))
    return LEARNING_RATE * max(decayed, 0.01) * min(1.0, num_steps / WARMUP_STEPS)


def _is_hidden(name: str) -> bool:
    return not any(part in name for part in ("embed", "lm_head", "mark_head"))
