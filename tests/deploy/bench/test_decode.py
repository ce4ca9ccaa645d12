"""Decode is measured against transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench import decode
from deploy.bench.reference_decode import load
from protos.checkpoint import open_checkpoint


def test_both_ratios_are_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode.run(checkpoint, num_threads=1, dtype="float32", rounds=1)
    printed = capsys.readouterr().out
    assert "transformers generate" in printed and "8 streams / 1 stream" in printed


def test_the_reference_takes_every_weight_of_the_language_half(checkpoint: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    model = load(opened, "float32")
    assert sum(1 for _ in model.parameters()) == len(opened.language_names())
