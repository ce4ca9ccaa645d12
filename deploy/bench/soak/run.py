"""One run: services, a quiet conversation, then rounds of load with a rest behind each."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.bench.soak.actions import actions
from deploy.bench.soak.asker import Asker
from deploy.bench.soak.bad_input import MAX_BODY_BYTES, bad_inputs
from deploy.bench.soak.crowd import MAX_KEPT, Crowd, Tally
from deploy.bench.soak.gauges import Gauges
from deploy.bench.soak.pictures import Pictures
from deploy.bench.soak.rest import Rest, take_rest
from deploy.bench.soak.service_log import ServiceLog
from deploy.cli import add_common_arguments
from deploy.completions import Completions
from deploy.demo import PICTURE, QUESTIONS
from deploy.serve import ServeCommand, make_supervisor
from deploy.supervisor import free_ports

ROUNDS = 60  # of a long run; in a short one they get no shorter than MIN_ROUND_S
MIN_ROUND_S, MAX_ROUND_S = 4.0, 30.0
# Every cache is small, so that it is full before the warm-up is over: what grows later is no cache.  The KV
# cache has room for some of the clients only, so that sequences wait and are preempted.
SERVE_FLAGS = (
    "--num-kv-blocks=1024",
    "--visual-store-gib=0.02",
    "--encoder-tile-ring-mib=1",
    "--encoder-host-cache-mib=16",
    f"--max-body-bytes={MAX_BODY_BYTES}",
)


# PyTorch and oneDNN keep 1024 compiled products each, one a shape: with numbers of tokens as mixed as here
# they would go on filling up for long, to about 1 GiB.
SMALL_CACHES = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


@dataclass
class Record:
    """What a run has found so far."""

    rests: list[Rest] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    log: ServiceLog = field(default_factory=ServiceLog)


async def soak(seconds: float, seed: int, serve_flags: Sequence[str], record: Record) -> None:
    """The services take `SMALL_CACHES` from the environment of this process.

    Raises PartFailed, UsageError, CompletionError, Unexpected (on a quiet server), httpx.HTTPError."""
    llm_port, encoder_port = free_ports(2)
    wired = (f"--llm-metrics-port={llm_port}", f"--encoder-metrics-port={encoder_port}", "--port=0")
    arguments = _serve_arguments([*SERVE_FLAGS, *wired, *serve_flags])
    supervisor, _ = make_supervisor(ServeCommand().flags, arguments, record.log)
    try:
        host, _, port = (await supervisor.start()).rpartition(":")
        pages = {"gateway": int(port), "llm": llm_port, "encoder": encoder_port}
        gauges = Gauges({name: f"http://{host}:{number}/metrics" for name, number in pages.items()})
        asker = await asyncio.to_thread(_asker, host, int(port), seed)
        await _alternate(asker, gauges, seconds, seed, record)
    finally:
        record.log.is_stopping = True
        await supervisor.stop()


def _serve_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="... --", allow_abbrev=False)
    add_common_arguments(parser, ServeCommand())
    return parser.parse_args(argv)


def _asker(host: str, port: int, seed: int) -> Asker:
    client = Completions(f"http://{host}:{port}/v1")
    try:
        return Asker(host, port, client.models()[0], Pictures(PICTURE, seed), QUESTIONS)
    finally:
        client.close()


async def _alternate(asker: Asker, gauges: Gauges, seconds: float, seed: int, record: Record) -> None:
    """Load and rest, until the time is over or all goes wrong; the first rest is from before any load."""
    await asker.learn()
    mix = actions(bad_inputs(asker.model, asker.pictures.known_bytes))
    crowd = Crowd(asker, mix, seed, record.tally)
    ends_at = time.monotonic() + seconds
    round_s = min(max(seconds / ROUNDS, MIN_ROUND_S), MAX_ROUND_S)
    record.rests.append(await take_rest(gauges, None, 0))
    while (left_s := ends_at - time.monotonic()) > 0 and record.tally.num_failures < MAX_KEPT:
        await crowd.run_round(min(round_s, left_s))
        rest = await take_rest(gauges, record.rests[0].levels, record.tally.num_actions)
        record.rests.append(rest)
        _say(record, ends_at)


def _say(record: Record, ends_at: float) -> None:
    """A line a rest."""
    rest = record.rests[-1]
    memory = ", ".join(f"{name} {usage.rss >> 20}" for name, usage in sorted(rest.usages.items()))
    print(
        f"{max(ends_at - time.monotonic(), 0):5.0f} s left, {rest.num_actions} actions, "
        f"{record.tally.num_failures} unexpected; MiB: {memory}",
        file=sys.stderr,
        flush=True,
    )
