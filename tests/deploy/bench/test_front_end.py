"""The front end is measured through the real services."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench import front_end


def test_every_token_arrives_through_several_processes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front_end.run(checkpoint, (1, 64), 0.5, slowdown=1, num_servers=2, num_workers=2, max_tokens=16)
    printed = capsys.readouterr().out
    assert "llm 1" in printed and " 64 streams" in printed and "share of a core" in printed
