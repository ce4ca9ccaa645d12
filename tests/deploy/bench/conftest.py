"""One tiny checkpoint for the benchmarks: they are run here, their figures are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.random_checkpoint import write_random_checkpoint
from deploy.tiny_checkpoint import TINY


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("bench"), TINY)
