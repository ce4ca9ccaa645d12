"""A few real steps on the CPU: losses are counted by task, and the services load what comes out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.demo_training import train
from deploy.demo_training.batches import TASKS
from deploy.demo_training.checkpoint_files import demo_shape, read_weights, write_configs
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.trainer import load_model
from deploy.demo_training.vocabulary import make_tokenizer
from encoder_service.vision import VisionEncoder
from protos.checkpoint import open_checkpoint
from tests.llm_service.model.steps import load

STEPS = 3


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer, one layer a half."""
    folder = tmp_path_factory.mktemp("fresh")
    tokenizer = make_tokenizer(["what", "is", "the"])
    shape = demo_shape(tokenizer.get_vocab_size())
    write_configs(folder, tokenizer, dataclasses.replace(shape, vision_layers=1, layers=1))
    return folder


def run(checkpoint: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Train for a few steps; the lines of the log."""
    flags = f"--max-steps {STEPS} --num-tiles 10 --num-micro 1 --log-every 1 --no-compile".split()
    parsed = train.parse([str(checkpoint), "--output", str(output), "--seconds", "600", *flags, *more])
    train.run_training(parsed, FontShelf.find("held_out"))  # the ones that are there on any machine
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("trained")
    return output, run(fresh, output, "--first", "0.5", "--num-workers", "2")


def test_every_step_is_logged_by_task(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = trained[1]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["progress"] for line in lines] == pytest.approx([0.5, 0.6667, 0.8333], abs=1e-3)
    for line in lines:
        assert set(line["tasks"]) <= set(TASKS) and "talk" in line["tasks"]
        for task in line["tasks"].values():
            assert 0 <= task["exact"] <= 1 and task["answers"] >= 1 and 0 < task["loss"] < 12


def test_the_services_load_what_was_trained(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    checkpoint = open_checkpoint(str(trained[0]))
    tiles = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    assert VisionEncoder.load(checkpoint, "cpu").encode(tiles).shape == (1, 64, 384)
    assert load(trained[0]).config.num_layers == 1


def test_a_run_goes_on_from_weights_alone(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    before = read_weights(trained[0])
    run(trained[0], tmp_path, "--num-workers", "0", "--max-steps", "1")
    after = read_weights(tmp_path)
    assert before.keys() == after.keys()
    changes = [(after[name].float() - before[name].float()).abs().max().item() for name in before]
    # One warming step away: everything near where the first run ended, much of it moved.
    assert max(changes) < 0.05 and sum(change > 0 for change in changes) > len(changes) / 2


def test_a_fresh_start_depends_on_the_seed_alone(fresh: Path) -> None:
    weights = [load_model(fresh, seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["mark_head.weight"], weights[2]["mark_head.weight"])
