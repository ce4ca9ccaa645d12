"""A run in tables for people and in JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deploy.bench.soak.crowd import Tally
from deploy.bench.soak.rest import Rest
from deploy.bench.soak.verdict import MIB, Row, rows


def table(rests: Sequence[Rest], tally: Tally) -> str:
    """Markdown: what was done, and what every process held at rest."""
    lines = ["| action | times | longest, s |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {tally.counts[name]} | {tally.seconds[name]:.1f} |" for name in sorted(tally.counts)
    ]
    lines += [
        "",
        "| process | RSS, MiB | at the end | slope, MiB/h | at least | B/action | fds | threads |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(_line, rows(rests)),
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    per_hour = [3600 / MIB * value for value in (row.trend.slope, row.trend.least)]
    cells = (
        row.name,
        f"{row.first_rss / MIB:.1f}",
        f"{row.last_rss / MIB:.1f}",
        *(f"{value:+.1f}" for value in per_hour),
        f"{row.per_action:+.0f}",
        f"{row.warm_fds} -> {row.last_fds}",
        f"{row.warm_threads} -> {row.last_threads}",
    )
    return f"| {' | '.join(cells)} |"


def as_json(
    rests: Sequence[Rest], tally: Tally, faults: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        **facts,
        "faults": list(faults),
        "actions": tally.counts,
        "longest_s": tally.seconds,
        "unexpected": tally.failures,
        "rests": [asdict(rest) for rest in rests],
    }
