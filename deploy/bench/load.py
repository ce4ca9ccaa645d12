"""Closed-loop load on an OpenAI-compatible server: times to first token and between tokens, and rates.

`python -m deploy.bench.load --base-url URL ...`: prints a JSON line a level.  Flags, requests and definitions
are those of the generator that the peers were measured with: each stream sends its next request when its last
is answered; every failure is counted, none is retried; the time of a token is that from first to last text
over one token less than the answer has.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
import uvloop

from deploy.bench.answer import Answer
from deploy.bench.connection import Connection, connect
from deploy.bench.workload import Workload, request_bodies

WARMUP_SEED = 1000
ERROR_CHARS = 200
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One answered request.  Seconds."""

    first_token_s: float
    token_s: float
    total_s: float
    num_prompt_tokens: int
    num_tokens: int
    usage: dict[str, Any]

    @classmethod
    def of(cls, answer: Answer, start: float, end: float) -> Sample:
        first = end if answer.first_text_at is None else answer.first_text_at
        last = end if answer.last_text_at is None else answer.last_text_at
        num_tokens = answer.usage.get("completion_tokens", answer.num_texts)
        return cls(
            first_token_s=first - start,
            token_s=(last - first) / max(num_tokens - 1, 1),
            total_s=end - start,
            num_prompt_tokens=answer.usage.get("prompt_tokens", 0),
            num_tokens=num_tokens,
            usage=answer.usage,
        )


class Stream:
    """One of the concurrent clients: a connection, made again after a failure."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self._base_url = base_url
        self._timeout_s = timeout_s
        self._connection: Connection | None = None

    async def ask(self, body: bytes) -> Sample:
        """Raises AnswerError, OSError, TimeoutError."""
        answer, start = Answer(), time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._connection is None or not self._connection.usable:
                    self._connection = await connect(self._base_url)
                await self._connection.post(body, answer)
        except BaseException:
            self.close()
            raise
        return Sample.of(answer, start, time.perf_counter())

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def run_level(base_url: str, bodies: Sequence[bytes], concurrency: int, timeout_s: float) -> Row:
    """Ask all bodies on `concurrency` streams; the row of the results."""
    samples: list[Sample] = []
    errors: list[str] = []
    todo = iter(bodies)
    start, cpu_start = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_ask_all(Stream(base_url, timeout_s), todo, samples, errors))
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    row = summarize(samples, errors, wall_s, concurrency)
    return row | {"wall_s": round(wall_s, 3), "client_cpu": round(cpu_s / wall_s, 3)}


async def _ask_all(stream: Stream, todo: Iterator[bytes], samples: list[Sample], errors: list[str]) -> None:
    for body in todo:
        try:
            samples.append(await stream.ask(body))
        except Exception as error:  # a row with errors in it, whatever they are
            errors.append(repr(error)[:ERROR_CHARS])
    stream.close()


def summarize(samples: Sequence[Sample], errors: Sequence[str], wall_s: float, concurrency: int) -> Row:
    """Rates over the level's duration; percentiles are linear between ranks (numpy's default)."""
    row: Row = {
        "concurrency": concurrency,
        "requests": len(samples) + len(errors),
        "errors": len(errors),
        "req_s": round(len(samples) / wall_s, 3),
        "out_tok_s": round(sum(sample.num_tokens for sample in samples) / wall_s, 1),
        "in_tok": round(mean([sample.num_prompt_tokens for sample in samples] or [0]), 1),
        "out_tok": round(mean([sample.num_tokens for sample in samples] or [0]), 1),
    }
    columns = {
        "ttft": [sample.first_token_s for sample in samples],
        "tpot": [sample.token_s for sample in samples],
        "e2e": [sample.total_s for sample in samples],
    }
    for name, seconds in columns.items():
        for percent in (50, 99):
            row[f"{name}_p{percent}_ms"] = _percentile_ms(seconds, percent)
    if errors:
        row["first_error"] = errors[0]
    return row


def _percentile_ms(seconds: Sequence[float], percent: int) -> float | None:
    return round(float(np.percentile(seconds, percent)) * 1e3, 2) if seconds else None


def served_model(base_url: str, timeout_s: float = 10.0) -> str:
    """Id of the first model that the server names.  Raises OSError."""
    with urllib.request.urlopen(base_url.rstrip("/") + "/models", timeout=timeout_s) as response:
        return str(json.loads(response.read())["data"][0]["id"])


async def run(arguments: argparse.Namespace) -> None:
    base_url = arguments.base_url
    model = arguments.model or served_model(base_url)
    width, height = (int(side) for side in arguments.size.split("x"))
    workload = Workload(
        arguments.images, width, height, arguments.prompt_words, arguments.max_tokens, arguments.requests
    )
    levels = [(concurrency, workload, arguments.seed) for concurrency in arguments.concurrency]
    if arguments.warmup:
        warmup = replace(workload, num_requests=arguments.warmup)
        levels.insert(0, (arguments.warmup, warmup, arguments.seed + WARMUP_SEED))
    for position, (concurrency, asked, seed) in enumerate(levels):
        count = asked.requests_at(concurrency)
        bodies = request_bodies(asked, model, seed + concurrency, count, arguments.same_image)
        row = await run_level(base_url, bodies, concurrency, arguments.timeout)
        if position or not arguments.warmup:
            print(json.dumps(row), flush=True)


def _levels(text: str) -> list[int]:
    return [int(level) for level in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="default: the first that the server names")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--same-image", action="store_true")
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--concurrency", type=_levels, default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2, help="requests, at as many streams, not counted")
    arguments = parser.parse_args(argv)
    gc.disable()  # nothing here makes cycles that matter; a pause would be somebody's time to first token
    uvloop.run(run(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
