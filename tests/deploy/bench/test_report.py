"""Targets, ratios and verdicts; other work is never called comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy.bench import report
from deploy.bench.workload import WORKLOADS

H200 = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0+cu130",
    "commit": "abc1234",
    "date": "2026-11-21",
}
PEERS = report.read_peers()


def row(workload: str, concurrency: int, **figures: Any) -> dict[str, Any]:
    asked = WORKLOADS[workload]
    return {
        "concurrency": concurrency,
        "requests": asked.requests_at(concurrency),
        "errors": 0,
        "in_tok": PEERS["prompt_tokens"][workload] + 0.4,
        "out_tok": asked.max_tokens,
        **figures,
    }


def result(**rows: list[dict[str, Any]]) -> report.Result:
    return {"machine": H200, "workloads": rows, "stages": {}}


def line(measured: report.Result, label: str) -> report.Line:
    (found,) = [line for line in report.compare(measured, PEERS) if line.target.label.startswith(label)]
    return found


@pytest.mark.parametrize(("value", "ratio", "reached"), [(4.63, 1.0, False), (4.0, 1.1575, True)])
def test_less_time_is_better(value: float, ratio: float, reached: bool) -> None:
    found = line(result(text=[row("text", 1, tpot_p50_ms=value)]), "text, 1 stream")
    assert found.best_peer == 4.63 and found.ratio == pytest.approx(ratio) and found.reached is reached


@pytest.mark.parametrize(("value", "ratio", "reached"), [(17678.9, 1.0, False), (20500, 1.15958, True)])
def test_more_tokens_are_better(value: float, ratio: float, reached: bool) -> None:
    found = line(result(text=[row("text", 256, out_tok_s=value)]), "text, 256 streams")
    assert found.best_peer == 17678.9 and found.reached is reached
    assert found.ratio == pytest.approx(ratio, rel=1e-4)


def test_every_target_has_both_peers_and_the_best_are_those_of_the_targets() -> None:
    lines = report.compare(result(), PEERS)
    assert [line.best_peer for line in lines] == [4.63, 10100.3, 17678.9, 137.1, 9.72, 410.3, 3.91]
    assert [line.target.goal for line in lines] == [4.1, 11300, 20500, 95, 10.4, 245, 4.1]
    assert all(len(line.peers) == 2 and line.measured is None and not line.reached for line in lines)


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        ({"errors": 2, "first_error": "503"}, "2 of 32 requests failed: 503"),
        ({"requests": 4}, "4 requests, not 32"),
        ({"in_tok": 215}, "prompts of 215 tokens, not 151"),
        ({"out_tok": 8}, "answers of 8 tokens, not 256"),
    ],
)
def test_other_work_is_not_comparable(flaw: dict[str, Any], text: str) -> None:
    measured = result(text=[row("text", 1, tpot_p50_ms=1.0, **flaw)])
    assert not line(measured, "text, 1 stream").reached
    printed = report.markdown(measured, PEERS)
    assert f"- **Not comparable**: text, 1 stream: {text}" in printed and "| not comparable |" in printed
    assert "| reached |" not in printed


def test_a_figure_that_cannot_be_divided_by_is_not_measured() -> None:
    measured = result(text=[row("text", 1, tpot_p50_ms=0.0)])
    assert line(measured, "text, 1 stream").ratio is None
    assert "| not measured |" in report.markdown(measured, PEERS)


def test_other_hardware_is_not_comparable() -> None:
    measured = result(text=[row("text", 1, tpot_p50_ms=1.0)]) | {"machine": H200 | {"gpu": "no GPU"}}
    assert not line(measured, "text, 1 stream").reached
    assert "measured on no GPU, not on an H200" in report.markdown(measured, PEERS)


def test_the_report_names_hardware_driver_versions_and_commit() -> None:
    printed = report.markdown(result(text=[row("text", 1, tpot_p50_ms=4.0)]), PEERS)
    assert printed.startswith("NVIDIA H200, driver 580.1, torch 2.11.0+cu130, commit abc1234, 2026-11-21\n")
    target = "| text, 1 stream, time per output token, ms | 4.68 | 4.63 | <= 4.1 | **4** | 1.16 | reached |"
    assert target in printed


def test_runs_are_joined_and_the_last_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = result(text=[row("text", 1, tpot_p50_ms=5.0), row("text", 64, out_tok_s=9000)])
    second = result(text=[row("text", 1, tpot_p50_ms=4.0)]) | {"machine": H200 | {"commit": "def5678"}}
    for name, run in (("a", first), ("b", second)):
        report.write(run, tmp_path / name)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert report.main([*files, "--out", str(tmp_path / "h200")]) == 0
    joined = json.loads((tmp_path / "h200.json").read_text())
    assert [level["concurrency"] for level in joined["workloads"]["text"]] == [1, 64]
    assert joined["workloads"]["text"][0]["tpot_p50_ms"] == 4.0
    assert "commit abc1234, def5678" in capsys.readouterr().out
    assert (tmp_path / "h200.md").read_text().count("\n| text, ") == 3


def test_the_plot_shows_what_can_be_compared(tmp_path: Path) -> None:
    rows = [row("text", 1, tpot_p50_ms=4.0), row("text", 64, out_tok_s=9000, requests=3)]
    report.write(result(text=rows), tmp_path / "x")
    plot = (tmp_path / "x.svg").read_text()
    ElementTree.fromstring(plot)
    assert "text, 1 stream" in plot and "text, 64 streams" not in plot and "4.63 ms  (1.00)" in plot
