"""bfloat16 weights follow their fp32 masters, also by less than their own rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deploy.demo_training.checkpoint_files import demo_shape
from deploy.demo_training.model import DemoModel, initialise
from deploy.demo_training.optimizer import LEARNING_RATE, MasterOptimizer, learning_rate

SHAPE = dataclasses.replace(demo_shape(64), vision_layers=1, layers=1)


@pytest.fixture
def model() -> DemoModel:
    model = DemoModel(SHAPE)
    initialise(model, seed=0)
    return model.bfloat16()


def loss_of(model: DemoModel) -> torch.Tensor:
    ids = torch.arange(64)[None]
    logits = model(
        torch.empty(0, 3, 224, 224).bfloat16(), ids, torch.empty(0, dtype=torch.int64), torch.arange(63)
    )
    return torch.nn.functional.cross_entropy(logits.logits.float(), ids[0, 1:])


def test_it_learns_a_sequence(model: DemoModel) -> None:
    optimizer = MasterOptimizer(model)
    first = loss_of(model).item()
    for _ in range(25):
        loss_of(model).backward()
        optimizer.step(progress=0.0)
    assert loss_of(model).item() < 0.1 * first


def test_steps_below_the_rounding_of_bfloat16_add_up(model: DemoModel) -> None:
    """A gain of one moves by 1e-4 a step, a fortieth of what separates it from the next bfloat16."""
    optimizer = MasterOptimizer(model)
    gain = model.language_model.model.norm.weight
    for _ in range(60):
        gain.grad = torch.ones_like(gain)
        optimizer.step(progress=0.97)
    assert (gain < 1).all() and (gain > 0.97).all()


def test_gradients_are_gone_after_a_step(model: DemoModel) -> None:
    optimizer = MasterOptimizer(model)
    loss_of(model).backward()
    optimizer.step(progress=0.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_rate_warms_up_in_every_run_and_ends_near_zero() -> None:
    assert learning_rate(0.0, 1) < 0.05 * LEARNING_RATE
    assert learning_rate(0.2, 1000) == LEARNING_RATE
    assert learning_rate(1.0, 1000) == pytest.approx(0.01 * LEARNING_RATE)
