"""The definitions of the figures, and a closed loop against a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np

from deploy.bench.answer import Answer
from deploy.bench.load import Sample, run_level, summarize
from deploy.bench.workload import WORKLOADS, request_bodies
from tests.deploy.bench.scripted_server import ScriptedServer

TEXT = replace(WORKLOADS["text"], max_tokens=3)


def answer(first: float | None, last: float | None, **usage: int) -> Answer:
    made = Answer()
    made.first_text_at, made.last_text_at, made.usage, made.num_texts = first, last, dict(usage), 4
    return made


def test_a_sample_is_timed_from_sending() -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 11}
    sample = Sample.of(answer(12.0, 14.0, **usage), start=10.0, end=15.0)
    assert (sample.first_token_s, sample.total_s, sample.token_s) == (2.0, 5.0, 0.2)
    assert (sample.num_prompt_tokens, sample.num_tokens) == (20, 11)


def test_without_usage_events_are_counted_and_without_text_the_end_counts() -> None:
    assert Sample.of(answer(12.0, 13.5), start=10.0, end=15.0).token_s == 0.5
    silent = Sample.of(answer(None, None, completion_tokens=1), start=10.0, end=15.0)
    assert (silent.first_token_s, silent.token_s) == (5.0, 0.0)


def test_a_row_has_rates_over_the_wall_and_percentiles_between_ranks() -> None:
    rng = np.random.default_rng(1)
    firsts, totals, tokens = rng.random(37), 2 + rng.random(37), rng.integers(1, 50, 37)
    samples = [
        Sample(float(first), float(first) / 10, float(total), 100 + index, int(count), {})
        for index, (first, total, count) in enumerate(zip(firsts, totals, tokens, strict=True))
    ]
    row = summarize(samples, ["a", "b"], wall_s=4.0, concurrency=5)
    assert (row["concurrency"], row["requests"], row["errors"], row["first_error"]) == (5, 39, 2, "a")
    assert row["req_s"] == 9.25 and row["out_tok_s"] == round(tokens.sum() / 4, 1)
    assert row["in_tok"] == 118.0 and row["out_tok"] == round(tokens.mean(), 1)
    ranked = np.sort(firsts) * 1e3
    assert row["ttft_p50_ms"] == round(ranked[18], 2)
    assert row["ttft_p99_ms"] == round(ranked[35] + 0.64 * (ranked[36] - ranked[35]), 2)
    assert row["tpot_p50_ms"] == round(ranked[18] / 10, 2)
    assert row["e2e_p50_ms"] == round(np.sort(totals)[18] * 1e3, 2)


def test_a_row_of_failures_has_no_percentiles() -> None:
    row = summarize([], ["refused"], wall_s=1.0, concurrency=1)
    assert row["ttft_p50_ms"] is None and row["req_s"] == 0 and row["first_error"] == "refused"


async def test_a_level_keeps_so_many_requests_in_flight_and_asks_each_once() -> None:
    server = ScriptedServer(tokens=3, pause_s=0.01)
    async with server.listening() as base_url:
        row = await run_level(base_url, request_bodies(TEXT, "m", 1, 12), 4, 30)
    assert (row["requests"], row["errors"], row["in_tok"], row["out_tok"]) == (12, 0, 11, 3)
    assert (server.connections, server.most_open, len(server.bodies)) == (4, 4, 12)
    assert len({body["messages"][0]["content"][0]["text"] for body in server.bodies}) == 12
    assert row["ttft_p50_ms"] >= 10 and row["tpot_p50_ms"] >= 9
    assert row["e2e_p50_ms"] >= row["ttft_p50_ms"] + 2 * 9


async def test_failures_are_counted_and_not_repeated() -> None:
    server = ScriptedServer(fail=lambda number: number == 1, hang_up=lambda number: number == 3)
    async with server.listening() as base_url:
        row = await run_level(base_url, request_bodies(TEXT, "m", 1, 6), 1, 30)
    assert (row["requests"], row["errors"], len(server.bodies)) == (6, 2, 6)
    assert "503 busy" in row["first_error"]


async def test_a_request_that_takes_too_long_fails() -> None:
    server = ScriptedServer(pause_s=5)
    async with server.listening() as base_url:
        row = await run_level(base_url, request_bodies(TEXT, "m", 1, 1), 1, 0.1)
    assert row["errors"] == 1 and "TimeoutError" in row["first_error"]


async def test_the_program_prints_a_row_a_level_and_not_the_warmup() -> None:
    server = ScriptedServer()
    async with server.listening() as base_url:
        command = [sys.executable, "-m", "deploy.bench.load", f"--base-url={base_url}", "--images=0"]
        flags = ["--prompt-words=5", "--max-tokens=3", "--concurrency=1,9", "--requests=40"]
        finished = await asyncio.to_thread(
            subprocess.run, [*command, *flags], capture_output=True, text=True, timeout=60
        )
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [(row["concurrency"], row["requests"], row["errors"]) for row in rows] == [(1, 32, 0), (9, 40, 0)]
    assert len(server.bodies) == 2 + 32 + 40
    assert server.bodies[0] | {"messages": None} == {
        "model": "scripted",
        "messages": None,
        "stream": True,
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
