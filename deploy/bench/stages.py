"""Where each millisecond of a request goes: the services' own clocks, one request at a time.

The services publish sums of seconds by stage; with one request in flight, the difference of two readings is
that request's.  What no clock measures is named, not guessed.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from deploy.bench.load import Sample, Stream
from deploy.bench.workload import Workload, request_bodies

SEED = 5000
POLL_S = 0.01
SETTLE_S = 5.0
LINE = re.compile(r"^tessera_(llm|encoder)_(\w+?)(?:\{stage=\"(\w+)\"\})? ([0-9.e+-]+)$", re.MULTILINE)
SUMS, COUNTS = "stage_seconds_sum", "stage_seconds_count"
# In the order of a request; (row, what it is).  "+" rows lie inside the row above.
STAGES = (
    ("first token", "client: request sent to first text"),
    ("layout", "front end: pictures hashed and sent, headers read, prompt built"),
    ("queue", "front end: lengths known to first scheduled"),
    ("prefill", "front end: first scheduled to first token, waits for tiles included"),
    ("+ overlap", "engine: steps for the prompt that began before its last visual token had come"),
    ("encode", "front end: first grant to last visual token; overlaps queue and prefill"),
    ("+ picture decode", "encoder: bytes to pixels, summed over pictures"),
    ("+ tile", "encoder: resize and crop, summed over pictures"),
    ("+ tower queue", "encoder: a tile's wait for a forward, mean over tiles"),
    ("+ ViT", "encoder: the forward that a tile shared, mean over tiles"),
    ("+ transfer", "encoder: embeddings of that forward to the host, mean over tiles (where published)"),
    ("decode", "front end: first to last token"),
    ("a token", "decode over one token less than the answer has"),
    ("gateway and wire", "total less layout, queue, prefill and decode: HTTP, JSON, gRPC, text, SSE"),
    ("+ to first text", "first token less layout, queue and prefill"),
    ("total", "client: request sent to end of the stream"),
)
WITHOUT_CLOCK = (
    "a tile's way from the encoder's memory to the engine's (serialise, TCP, copy) and from there to the GPU",
    "the tower's busy time for one request (a forward counts for every tile that shared it)",
    "parts of an engine step (schedule, inputs, forward, sample, output)",
    "the parts of gateway and wire",
)


@dataclass(frozen=True)
class Pages:
    """Where the metrics of the language model and the encoder are."""

    llm: str
    encoder: str

    def read(self) -> dict[tuple[str, str, str], float]:
        """(service, series, stage or "") -> value.  Raises OSError."""
        values: dict[tuple[str, str, str], float] = {}
        for url in (self.llm, self.encoder):
            with urllib.request.urlopen(url, timeout=SETTLE_S) as response:
                page = response.read().decode()
            values |= {
                (service, name, stage): float(value) for service, name, stage, value in LINE.findall(page)
            }
        return values

    def read_after(
        self, before: Mapping[tuple[str, str, str], float], services: Sequence[str]
    ) -> dict[tuple[str, str, str], float]:
        """As soon as each of the services has counted one request more.  Raises TimeoutError."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            now = self.read()
            if all(_count(now, service) > _count(before, service) for service in services):
                return now
            time.sleep(POLL_S)
        raise TimeoutError(f"no stage times from {' and '.join(services)} after {SETTLE_S:.0f} s")


async def measure(
    base_url: str, model: str, workload: Workload, tokens_per_tile: int, pages: Pages, count: int
) -> dict[str, dict[str, float]]:
    """Mean and median of each stage in milliseconds, by the names in STAGES; one request goes ahead.

    Raises:
        AnswerError, OSError, TimeoutError: a request failed, or a service does not count it.
    """
    services = ("llm", "encoder") if workload.num_images else ("llm",)
    stream = Stream(base_url, timeout_s=120)
    requests: list[dict[str, float]] = []
    for body in request_bodies(workload, model, SEED, count + 1):
        before = pages.read()
        sample = await stream.ask(body)
        after = pages.read_after(before, services)
        requests.append(split(sample, before, after, tokens_per_tile))
    stream.close()
    return {
        name: {
            "mean_ms": round(mean(request[name] for request in requests[1:]) * 1e3, 3),
            "p50_ms": round(median(request[name] for request in requests[1:]) * 1e3, 3),
        }
        for name in requests[0]
    }


def split(
    sample: Sample,
    before: Mapping[tuple[str, str, str], float],
    after: Mapping[tuple[str, str, str], float],
    tokens_per_tile: int,
) -> dict[str, float]:
    """Seconds of one request by the names in STAGES, without those that it did not pass."""

    def spent(service: str, stage: str) -> float:
        key = (service, SUMS, stage)
        return after.get(key, 0.0) - before.get(key, 0.0)

    llm = {stage: spent("llm", stage) for stage in ("layout", "queue", "prefill", "encode", "decode")}
    to_first_token = llm["layout"] + llm["queue"] + llm["prefill"]
    stages = {
        "first token": sample.first_token_s,
        **{stage: llm[stage] for stage in ("layout", "queue", "prefill", "decode")},
        "a token": llm["decode"] / max(sample.num_tokens - 1, 1),
        "gateway and wire": sample.total_s - to_first_token - llm["decode"],
        "+ to first text": sample.first_token_s - to_first_token,
        "total": sample.total_s,
    }
    details: dict[str, Any] = sample.usage.get("prompt_tokens_details") or {}
    num_tiles = (details.get("image_tokens") or 0) // tokens_per_tile
    if num_tiles:
        stages |= {
            "+ overlap": spent("llm", "overlap"),
            "encode": llm["encode"],
            "+ picture decode": spent("encoder", "decode"),
            "+ tile": spent("encoder", "tile"),
            "+ tower queue": spent("encoder", "queue") / num_tiles,
            "+ ViT": spent("encoder", "encode") / num_tiles,
        }
    if num_tiles and ("encoder", SUMS, "transfer") in after:
        stages["+ transfer"] = spent("encoder", "transfer") / num_tiles
    return stages


def table(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown; `measured` is by workload, then by stage."""
    names = list(measured)
    head = "".join(f" {name}: mean | p50 |" for name in names)
    lines = [f"| stage, ms |{head} clock |", "|---|" + "---:|---:|" * len(names) + "---|"]
    for stage, clock in STAGES:
        cells = [measured[name].get(stage) for name in names]
        values = "".join(
            f" {cell['mean_ms']:.2f} | {cell['p50_ms']:.2f} |" if cell else " | |" for cell in cells
        )
        lines.append(f"| {stage} |{values} {clock} |")
    return "\n".join([*lines, "", f"Without a clock of their own: {'; '.join(WITHOUT_CLOCK)}."])


def _count(values: Mapping[tuple[str, str, str], float], service: str) -> float:
    stage = "total" if service == "llm" else "encode"
    return values.get((service, COUNTS, stage), 0.0)
