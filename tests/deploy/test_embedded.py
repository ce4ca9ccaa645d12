"""The embedded checkpoint is whole, small and in the original format; a partial one is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from deploy.embedded import embedded_checkpoint
from protos.checkpoint import CheckpointError, CheckpointFormat, open_checkpoint
from protos.preprocessing import Preprocessing

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10416760\n"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A copy whose weights a test may spoil."""
    return Path(shutil.copytree(embedded_checkpoint(), tmp_path / "demo_model"))


def test_it_is_a_small_checkpoint_in_the_original_format() -> None:
    checkpoint = open_checkpoint(str(embedded_checkpoint()))
    assert checkpoint.format is CheckpointFormat.CHAT
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()) <= 16_000_000
    assert sum(file.stat().st_size for file in checkpoint.folder.iterdir()) <= 32_000_000
    assert Preprocessing.from_checkpoint(checkpoint).tokens_per_tile == 64


def test_its_folder_has_a_model_card() -> None:
    assert (embedded_checkpoint() / "README.md").read_text(encoding="utf-8").startswith("# ")


def test_weights_that_are_missing_are_named(partial: Path) -> None:
    min(partial.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"holds \d+ of the \d+ bytes of the demo model's weights"):
        embedded_checkpoint(partial)


def test_pointers_of_git_lfs_are_no_weights(partial: Path) -> None:
    for shard in partial.glob("*.safetensors"):
        shard.write_text(POINTER)
    with pytest.raises(CheckpointError, match="check the repository out in full, or name a MODEL"):
        embedded_checkpoint(partial)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: check the repository out in full"):
        embedded_checkpoint(tmp_path)
