"""A minute of mixed load on real processes: the short form of `make soak`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_minute_of_mixed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    command = [sys.executable, "-m", "deploy.bench.soak", "--minutes", "1", "--json", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.endswith("no leak, no error\n")
    kept = json.loads(result.read_text())
    assert kept["faults"] == kept["unexpected"] == []
    assert len(kept["rests"]) > 3 and len(kept["actions"]) > 10
    assert {"encoder", "llm", "engine", "gateway"} <= set(kept["rests"][-1]["usages"])
