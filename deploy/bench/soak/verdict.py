"""Whether the rests of a run show a leak.

Everything is compared at rest, when no request is under way, so that load is no part of it.  Gauges must be
at the level of before, exactly.  Descriptors must not be more than in the rests of the warm-up, when every
connection has come to be; threads not more than that by a pool that was first needed later.

Resident memory is noisier: allocators keep what a peak needed, in steps that become rarer.  The engine, whose
live memory stays level, grows by some 10 MiB each time its age doubles, a leak by the same in every minute:
the first half of a run is warm-up.  A process leaks when both hold for the rests behind it, through which a
straight line is laid (trend.py):

- with 95 % confidence it grows by more than LEAK_PER_HOUR, 64 MiB: more than such steps are from the 15th
  minute to the 30th;
- what it grew by with that confidence is more than NOISE, 4 MiB, and than the width in which four fifths of
  the rests lie around the line: the heap of a process that takes and frees large bodies goes up and down by
  tens of MiB, which a run of a few minutes would extrapolate to hundreds of MiB an hour.  Where the warm-up
  was shorter than SETTLED_S it must be more than UNSETTLED, 64 MiB: so much a heap takes at a time
  (protos.malloc), to use it by and by.

In 30 minutes, some 30,000 actions on two cores, that finds 1 KiB an action; in one, 100 KiB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.soak.rest import Rest
from deploy.bench.soak.trend import Trend, spread, trend

MIB = 1 << 20
LEAK_PER_HOUR = 64 * MIB
NOISE = 4 * MIB
SETTLED_S = 600.0
UNSETTLED = 64 * MIB
WARM_UP_SHARE = 0.5
MIN_RESTS = 2
# Decoder processes are started when several documents are read at a time, and are then kept: their pipes in
# the encoder may come late.
MORE_FDS = {"encoder": 16}
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)  # of asyncio's default executor
TRANSIENT = "decoders"  # their processes come and go


@dataclass(frozen=True)
class Row:
    """One process behind the warm-up."""

    name: str
    first_rss: int
    last_rss: int
    trend: Trend  # bytes a second
    noise: float  # bytes: four fifths of the rests lie within, around the line
    per_action: float  # bytes, by the slope
    warm_fds: int
    last_fds: int
    warm_threads: int
    last_threads: int


def rows(rests: Sequence[Rest]) -> list[Row]:
    """By process.  Needs MIN_RESTS behind the warm-up."""
    warm, measured = split(rests)
    return [_row(name, warm, measured) for name in sorted(warm[-1].usages) if name in measured[-1].usages]


def split(rests: Sequence[Rest]) -> tuple[Sequence[Rest], Sequence[Rest]]:
    """Warm-up, the last of which is also the first that is measured."""
    num_warm = max(1, round(len(rests) * WARM_UP_SHARE))
    return rests[:num_warm], rests[num_warm - 1 :]


def _row(name: str, warm: Sequence[Rest], measured: Sequence[Rest]) -> Row:
    there = [rest for rest in measured if name in rest.usages]
    times, sizes = [rest.at_s for rest in there], [float(rest.usages[name].rss) for rest in there]
    slope = trend(times, sizes)
    seconds = there[-1].at_s - there[0].at_s
    num_actions = there[-1].num_actions - there[0].num_actions
    before = [rest.usages[name] for rest in warm if name in rest.usages]
    last = there[-1].usages[name]
    return Row(
        name,
        first_rss=there[0].usages[name].rss,
        last_rss=last.rss,
        trend=slope,
        noise=spread([size - slope.slope * at_s for at_s, size in zip(times, sizes, strict=True)]),
        per_action=slope.slope * seconds / max(num_actions, 1),
        warm_fds=max(usage.fds for usage in before),
        last_fds=last.fds,
        warm_threads=max(usage.threads for usage in before),
        last_threads=last.threads,
    )


def faults(rests: Sequence[Rest]) -> list[str]:
    """What is wrong, a line each."""
    if len(rests) < MIN_RESTS:
        return [f"only {len(rests)} rests: too short a run"]
    warm_at_s = split(rests)[0][-1].at_s
    seconds = rests[-1].at_s - warm_at_s
    noise = NOISE if warm_at_s - rests[0].at_s >= SETTLED_S else UNSETTLED
    return [
        *(f"rest {number}: left over: {rest.strays}" for number, rest in enumerate(rests) if rest.strays),
        *_restarts(rests),
        *(fault for row in rows(rests) for fault in _faults_of(row, seconds, noise)),
    ]


def _restarts(rests: Sequence[Rest]) -> list[str]:
    before, after = rests[0].usages, rests[-1].usages
    names = sorted(before.keys() - {TRANSIENT})
    return [
        f"{name}: other processes than at the start: it was started again, or is gone"
        for name in names
        if name not in after or before[name].pids != after[name].pids
    ]


def _faults_of(row: Row, seconds: float, noise: float) -> list[str]:
    found = []
    least = row.trend.least
    if least * 3600 > LEAK_PER_HOUR and least * seconds > max(noise, row.noise):
        found.append(f"{row.name}: memory grows by at least {least * 3600 / MIB:.0f} MiB an hour")
    if row.name == TRANSIENT:
        return found
    if row.last_fds > row.warm_fds + MORE_FDS.get(row.name, 0):
        found.append(f"{row.name}: {row.last_fds} descriptors, {row.warm_fds} when warm")
    if row.last_threads > row.warm_threads + POOL_THREADS:
        found.append(f"{row.name}: {row.last_threads} threads, {row.warm_threads} when warm")
    return found
