"""One tiny checkpoint for the benchmarks: they are run here, their figures are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.random_checkpoint import TOKENIZER_SIZE, CheckpointShape, write_random_checkpoint

TINY = CheckpointShape(
    image_size=224,  # 64 visual tokens a tile
    vision_hidden=64,
    vision_intermediate=128,
    vision_layers=2,
    vision_heads=4,
    hidden=96,
    intermediate=192,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab_size=TOKENIZER_SIZE,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("bench"), TINY)
