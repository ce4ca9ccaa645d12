"""`python -m deploy.bench.placement`: policies of choosing a replica, simulated on a trace.

The choice itself, and what a front end knows about the load of others, is the services' own code
(`protos/placement.py`); only the replicas are simulated: a queue each, and a cache that forgets what was used
longest ago.  No network, no batches, no failures: good for comparing policies, not for predicting a latency.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from deploy.bench.placement_trace import TraceRequest, make_trace
from gateway.llm_client import FREE_SEQUENCES
from llm_service.encoder_pool import FREE_TILES
from protos.placement import MAX_LOAD_RATIO, Load, choose, rendezvous_order

NUM_REPLICAS = 4
NUM_FRONT_ENDS = 4  # that do not talk to each other
POLL_INTERVAL_S = 0.5
# One H200, InternVL3-8B in shape (docs/benchmarks): 14 tiles in 20.4 ms; prefill at some 25,000 tokens/s; a
# step of n sequences takes 3.6 ms + 0.036 ms n.
TILE_S = 0.0015
PROMPT_TOKEN_S = 4e-5
STEP_S, STEP_SEQUENCE_S = 0.0036, 3.6e-5
CACHED_TILES = 9300  # 16 GiB of 256 x 3584 x 2 bytes
CACHED_TOKENS = 1_800_000  # of 57 KB, beside weights of 16 GB
# Requests a second and for how long: encoders a tenth and half busy, language models a fifth and two thirds.
PICTURE_LOADS = ((30, 600), (150, 300))
CONVERSATION_LOADS = ((2, 3600), (7, 3600))

Policy = Callable[[bytes, Mapping[str, float], float], str]
MakePolicy = Callable[[int], Policy]  # of the front end with this number


def policies(free: float) -> dict[str, MakePolicy]:
    """By name; `free` as the services have it."""
    return {
        "round robin": _round_robin,
        "random": _random,
        "least loaded": _least_loaded,
        "rendezvous": lambda number: lambda key, loads, weight: rendezvous_order(key, loads)[0],
        f"rendezvous, load <= {MAX_LOAD_RATIO} of mean": lambda number: choose,
        f"the same, up to {free} free": lambda number: partial(choose, free=free),
    }


def _round_robin(number: int) -> Policy:
    turns = itertools.count(number)
    return lambda key, loads, weight: list(loads)[next(turns) % len(loads)]


def _least_loaded(number: int) -> Policy:
    rng = random.Random(number)
    return lambda key, loads, weight: min(loads, key=lambda name: (loads[name], rng.random()))


def _random(number: int) -> Policy:
    rng = random.Random(number)
    return lambda key, loads, weight: rng.choice(list(loads))


@dataclass
class SimulatedReplica:
    """A queue and a cache."""

    capacity: int  # of the cache, in units of work
    free_at_s: float = 0.0
    running: int = 0
    _cache: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    _cached: int = 0

    def cached(self, key: bytes) -> int:
        return self._cache.get(key, 0)

    def keep(self, key: bytes, size: int) -> None:
        self._cached += size - self._cache.pop(key, 0)
        self._cache[key] = size
        while self._cached > self.capacity and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1]

    def work(self, now_s: float, duration_s: float) -> float:
        """When this is done, behind what is there."""
        self.free_at_s = max(now_s, self.free_at_s) + duration_s
        return self.free_at_s


@dataclass(frozen=True)
class Outcome:
    hit_rate: float  # of the work that some replica could have had in its cache
    latencies_s: list[float]
    places: list[str]  # of each piece of work

    def percentile_s(self, percent: int) -> float:
        return statistics.quantiles(self.latencies_s, n=100)[percent - 1]


class Simulation:
    """Front ends that place work by a policy, and replicas that do it."""

    def __init__(self, make_policy: MakePolicy, num_replicas: int, capacity: int) -> None:
        self.replicas = {f"10.0.0.{number}:1": SimulatedReplica(capacity) for number in range(num_replicas)}
        self._policies = [make_policy(number) for number in range(NUM_FRONT_ENDS)]
        self._loads = [{name: Load() for name in self.replicas} for _ in range(NUM_FRONT_ENDS)]
        self._ends: list[tuple[float, int, str, int]] = []
        self._polled_s = 0.0
        self._rng = random.Random(0)

    def any_front_end(self) -> int:
        return self._rng.randrange(NUM_FRONT_ENDS)

    def advance(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_s:
            _, front_end, name, weight = heapq.heappop(self._ends)
            self._loads[front_end][name].own -= weight
            self.replicas[name].running -= 1
        if now_s - self._polled_s >= POLL_INTERVAL_S:
            self._polled_s = now_s
            for name in self.replicas:
                total = sum(loads[name].own for loads in self._loads)
                for loads in self._loads:
                    loads[name].report(total)

    def place(self, front_end: int, key: bytes, weight: int) -> str:
        loads = {name: load.total for name, load in self._loads[front_end].items()}
        return self._policies[front_end](key, loads, weight)

    def begin(self, front_end: int, name: str, weight: int) -> None:
        self._loads[front_end][name].own += weight
        self.replicas[name].running += 1

    def end_at(self, end_s: float, front_end: int, name: str, weight: int) -> None:
        heapq.heappush(self._ends, (end_s, front_end, name, weight))


def encode(trace: Sequence[TraceRequest], make_policy: MakePolicy, num_replicas: int) -> Outcome:
    """First turns with pictures; a request waits for the last of its pictures."""
    it = Simulation(make_policy, num_replicas, CACHED_TILES)
    hits, latencies, places = [], [], []
    for request in (one for one in trace if one.pictures):
        it.advance(request.time_s)
        front_end = it.any_front_end()
        ends = [request.time_s]
        for picture in request.pictures:
            tiles = picture.num_tiles
            name = it.place(front_end, picture.content_hash, tiles)
            replica = it.replicas[name]
            is_known = replica.cached(picture.content_hash) > 0
            replica.keep(picture.content_hash, tiles)
            it.begin(front_end, name, tiles)
            ends.append(request.time_s if is_known else replica.work(request.time_s, tiles * TILE_S))
            it.end_at(ends[-1], front_end, name, tiles)
            hits.append(is_known)
            places.append(name)
        latencies.append(max(ends) - request.time_s)
    return Outcome(statistics.mean(hits), latencies, places)


def answer(trace: Sequence[TraceRequest], make_policy: MakePolicy, num_replicas: int) -> Outcome:
    """Time to the first token; the prompt's part that is in the KV cache costs nothing."""
    it = Simulation(make_policy, num_replicas, CACHED_TOKENS)
    known, cached, latencies, places = 0, 0, [], []
    for request in trace:
        it.advance(request.time_s)
        front_end = it.any_front_end()
        name = it.place(front_end, request.key, 1)
        replica = it.replicas[name]
        reused = min(replica.cached(request.key), request.known_tokens)
        it.begin(front_end, name, 1)
        step_s = STEP_S + STEP_SEQUENCE_S * replica.running
        # Prompts share the GPU with the answers: the more of them run, the less is left.
        first_s = replica.work(request.time_s, (request.prompt_tokens - reused) * PROMPT_TOKEN_S + step_s)
        replica.keep(request.key, request.prompt_tokens + request.answer_tokens)
        it.end_at(first_s + request.answer_tokens * step_s, front_end, name, 1)
        known, cached = known + request.known_tokens, cached + reused
        latencies.append(first_s - request.time_s)
        places.append(name)
    return Outcome(cached / known, latencies, places)


def table(
    run: Callable[[Sequence[TraceRequest], MakePolicy, int], Outcome],
    trace: Sequence[TraceRequest],
    free: float,
) -> list[str]:
    """Markdown."""
    n = NUM_REPLICAS
    lines = [
        f"| policy | hits | p50, ms | p99, ms | moved, {n} to {n + 1} | moved, {n} to {n - 1} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, make_policy in policies(free).items():
        outcome, more, fewer = (run(trace, make_policy, count) for count in (n, n + 1, n - 1))
        moved = [
            statistics.mean(old != new for old, new in zip(outcome.places, other.places, strict=True))
            for other in (more, fewer)
        ]
        p50, p99 = (1000 * outcome.percentile_s(percent) for percent in (50, 99))
        cells = f"{outcome.hit_rate:.1%} | {p50:,.1f} | {p99:,.0f} | {moved[0]:.0%} | {moved[1]:.0%}"
        lines.append(f"| {name} | {cells} |")
    return lines


def main() -> None:
    for per_s, duration_s in PICTURE_LOADS:
        print(f"Pictures on {NUM_REPLICAS} encoders, {per_s} requests/s:\n")
        print(*table(encode, make_trace(per_s, duration_s), FREE_TILES), "", sep="\n")
    for per_s, duration_s in CONVERSATION_LOADS:
        print(f"Conversations on {NUM_REPLICAS} language models, {per_s} requests/s:\n")
        print(*table(answer, make_trace(per_s, duration_s), FREE_SEQUENCES), "", sep="\n")


if __name__ == "__main__":
    main()
