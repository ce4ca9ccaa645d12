"""Transport is measured through the real call."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench import transport


def test_a_ratio_is_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transport.run(checkpoint, rounds=1, streams_per_round=1)
    assert "ratio" in capsys.readouterr().out
