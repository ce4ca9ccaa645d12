"""The whole benchmark for real, on the CPU: a tiny checkpoint, a few requests, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bench.gpu import load_command, main
from deploy.bench.workload import WORKLOADS
from tests.deploy.test_serve import children, command_line

BENCH = [sys.executable, "-m", "deploy.bench.gpu"]
TINY = ["--", "--device=cpu", "--load-format=auto", "--kv-cache-gib=0.1", "--visual-store-gib=0.1"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=240, env=environment)


def test_it_serves_measures_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    short = ["--workloads=text,1img", "--levels=1,16,64", "--requests=3", "--max-tokens=4", "--timings=2"]
    kept = tmp_path / "kept" / "tiny.json"
    finished = bench(f"--model={checkpoint}", f"--json={kept}", *short, *TINY)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(kept.read_text())
    levels = {name: [row["concurrency"] for row in rows] for name, rows in result["workloads"].items()}
    assert levels == {"text": [1, 64], "1img": [1, 16, 64]}
    for row in [row for rows in result["workloads"].values() for row in rows]:
        assert (row["requests"], row["errors"], row["out_tok"]) == (3, 0, 4)
        assert row["e2e_p50_ms"] >= row["ttft_p50_ms"] > 0
    stages = result["stages"]["1img"]
    assert all(stages[name]["mean_ms"] > 0 for name in ("prefill", "encode", "+ picture decode", "+ ViT"))
    assert "encode" not in result["stages"]["text"]
    assert "| prefill |" in finished.stdout and "not comparable" in finished.stdout
    assert kept.with_suffix(".md").read_text() in finished.stdout and kept.with_suffix(".svg").is_file()
    assert "--device=cpu" in result["serve_flags"]


def test_services_that_do_not_start_fail_it_with_their_last_lines(checkpoint: Path) -> None:
    finished = bench(f"--model={checkpoint}", *TINY, "--num-kv-blocks=1", "--max-model-len=100000000")
    assert finished.returncode == 1
    assert re.search(r"bench-gpu failed: llm ended \(exit code 1\)\n  ", finished.stderr), finished.stderr


def test_a_service_that_dies_ends_it_with_its_last_lines(checkpoint: Path, tmp_path: Path) -> None:
    short = ["--workloads=text", "--max-tokens=64", f"--json={tmp_path}/kept.json"]
    command = [*BENCH, f"--model={checkpoint}", *short, *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert running.stdout is not None
    try:
        assert running.stdout.readline().startswith("text {")  # one level is done
        (llm,) = [pid for pid in children(running.pid) if " llm " in command_line(pid)]
        os.kill(llm, signal.SIGKILL)
        _, errors = running.communicate(timeout=60)
    finally:
        running.terminate()
    assert running.returncode == 1 and "bench-gpu failed: llm ended (signal SIGKILL)" in errors
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["workloads"]["text"][0]["errors"] == 0


def test_services_that_take_too_long_fail_it(checkpoint: Path) -> None:
    finished = bench(f"--model={checkpoint}", "--start-timeout-s=0.2", *TINY)
    assert finished.returncode == 1
    assert "bench-gpu failed: the services were not ready within 0 s" in finished.stderr


def test_a_level_that_takes_too_long_fails_it_and_keeps_the_others(checkpoint: Path, tmp_path: Path) -> None:
    finished = bench(
        *(f"--model={checkpoint}", "--workloads=text", "--level-timeout-s=0.01"),
        *(f"--json={tmp_path}/x.json", *TINY),
    )
    assert finished.returncode == 1
    assert "bench-gpu failed: a level took more than 0 s" in finished.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workloads=video"], "--workloads: 'video' is none of text, 1img, 4img"),
        (["--levels=many"], "invalid literal"),
        (["--", "--device=abacus"], "--device must be one of auto, cpu, cuda, got 'abacus'"),
        (["--", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_wrong_usage_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_load_generator_is_called_with_the_peers_flags() -> None:
    """As docs/benchmarks/peers_h200.json has them."""
    from deploy.bench.report import read_peers

    for name, command in read_peers()["commands"].items():
        ours = " ".join(load_command("http://x/v1", "m", WORKLOADS[name], 60))
        for flag, value in re.findall(r"--(\S+) (\S+)", command):
            assert f"--{flag}={value}" in ours.split(), (name, flag)
