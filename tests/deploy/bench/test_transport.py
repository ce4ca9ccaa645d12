"""Transport is measured through the real call."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench import transport


def test_each_way_has_its_ratio_and_cpu_time(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transport.run(checkpoint, rounds=1, streams_per_round=1)
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines[2:]}
    assert list(rows) == ["raw TCP socket", "Encode, inline", "Encode, shared memory"]
    assert all(float(figure) > 0 for row in rows.values() for figure in row[:3])
