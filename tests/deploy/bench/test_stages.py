"""Stages are read from the services' real pages and add up to the request."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest

from deploy.bench import stages
from deploy.bench.load import Sample
from encoder_service import metrics as encoder_metrics
from encoder_service.tile_stream import StreamTimings
from llm_service.generation import GenerationUsage
from llm_service.generation_clock import GenerationTimings
from llm_service.metrics import count_usage

MS = 1_000_000
SUMS = "stage_seconds_sum"
TIMINGS = GenerationTimings(
    layout_ns=2 * MS,
    encode_ns=30 * MS,
    queue_ns=3 * MS,
    prefill_ns=50 * MS,
    overlap_ns=10 * MS,
    decode_ns=90 * MS,
    total_ns=145 * MS,
)


def pages(folder: Path) -> stages.Pages:
    """What both services publish, here from one process."""
    page = folder / "page"
    page.write_bytes(generate_latest())
    return stages.Pages(page.as_uri(), page.as_uri())


def one_request(folder: Path) -> dict[str, float]:
    before = pages(folder).read()
    count_usage(GenerationUsage(2669, 2560, 0, 10, TIMINGS))
    encoder_metrics.observe(StreamTimings(8 * MS, 12 * MS, 20 * MS, 160 * MS))
    after = pages(folder).read_after(before, ("llm", "encoder"))
    usage = {"prompt_tokens_details": {"image_tokens": 2560}}
    sample = Sample(0.060, 0.0101, 0.152, 2669, 10, usage)
    return stages.split(sample, before, after, tokens_per_tile=256)


def test_stages_are_those_of_the_request_alone(tmp_path: Path) -> None:
    one_request(tmp_path)  # what was before does not count
    seconds = one_request(tmp_path)
    milliseconds = {stage: round(value * 1e3, 6) for stage, value in seconds.items()}
    assert milliseconds | {"+ transfer": 0} == {
        "first token": 60,
        "layout": 2,
        "queue": 3,
        "prefill": 50,
        "+ overlap": 10,
        "encode": 30,
        "+ picture decode": 8,
        "+ tile": 12,
        "+ tower queue": 2,
        "+ ViT": 16,
        "+ transfer": 0,
        "decode": 90,
        "a token": 10,
        "gateway and wire": 7,
        "+ to first text": 5,
        "total": 152,
    }
    parts = ("layout", "queue", "prefill", "decode", "gateway and wire")
    assert sum(milliseconds[part] for part in parts) == pytest.approx(milliseconds["total"])
    assert set(seconds) <= {stage for stage, _ in stages.STAGES}


def test_a_request_without_pictures_has_no_stages_of_the_encoder() -> None:
    sample = Sample(0.010, 0.004, 0.050, 151, 11, {"prompt_tokens_details": {"image_tokens": 0}})
    after = {("llm", SUMS, "prefill"): 0.006, ("llm", SUMS, "decode"): 0.040}
    seconds = stages.split(sample, {}, after, tokens_per_tile=256)
    assert seconds["a token"] == pytest.approx(0.004) and not any("tile" in stage for stage in seconds)


def test_a_service_that_counts_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SETTLE_S", 0.05)
    both = pages(tmp_path)
    with pytest.raises(TimeoutError, match="no stage times from llm after"):
        both.read_after(both.read(), ("llm",))


def test_the_table_has_a_line_a_stage_and_says_what_has_no_clock() -> None:
    table = stages.table({"text": {"queue": {"mean_ms": 0.21, "p50_ms": 0.2}}, "1img": {}})
    assert "| queue | 0.21 | 0.20 | | | front end: lengths known to first scheduled |" in table
    assert len(table.splitlines()) == 2 + len(stages.STAGES) + 2
    assert stages.WITHOUT_CLOCK[0] in table
