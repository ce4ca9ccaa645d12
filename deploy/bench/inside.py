"""What the engine alone reaches (results of `deploy.bench.engine_step`), and what float8 weights gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PEAK_GOAL, READ_GOAL = 0.70, 0.80
DECODE_GAIN_GOAL, PREFILL_GAIN_GOAL = 1.5, 1.4
LONG_PREFILL = 8192  # tokens
PLAIN, FLOAT8 = "none", "fp8"

Inside = Mapping[str, Mapping[str, Any]]  # by --quantization


@dataclass(frozen=True)
class Figure:
    """One line: a value, and what it is to reach."""

    key: str
    label: str
    value: float
    goal: float | None = None

    @property
    def verdict(self) -> str:
        return "" if self.goal is None else "reached" if self.value >= self.goal else "missed"


def figures(inside: Inside) -> list[Figure]:
    """Those whose measurements are there."""
    found = []
    for quantization, measured in inside.items():
        name = "bf16" if quantization == PLAIN else quantization
        for tokens, row in measured["prefill"].items():
            goal = PEAK_GOAL if name == "bf16" and int(tokens) == LONG_PREFILL else None
            label = f"prefill of {int(tokens):,} tokens, {name}: {row['ms']:.2f} ms, of 790 TFLOP/s"
            found.append(Figure(f"{name}_prefill_{tokens}_peak_share", label, row["peak_share"], goal))
        for batch, row in measured["decode"].items():
            goal = READ_GOAL if name == "bf16" and batch == "1" else None
            label = f"decode step at batch {batch}, {name}: {row['ms']:.2f} ms, of the read rate"
            found.append(Figure(f"{name}_decode_{batch}_read_share", label, row["read_share"], goal))
    return found + list(_gains(inside))


def _gains(inside: Inside) -> list[Figure]:
    """Times that float8 is faster than 16 bits."""
    plain = inside.get(PLAIN)
    found = []
    for quantization, measured in inside.items():
        if plain is None or quantization == PLAIN:
            continue
        for kind, unit in (("prefill", "tokens"), ("decode", "sequences")):
            for size in measured[kind].keys() & plain[kind].keys():
                gain = plain[kind][size]["ms"] / measured[kind][size]["ms"]
                goal = _gain_goal(kind, int(size)) if quantization == FLOAT8 else None
                label = f"{kind} of {int(size):,} {unit}, {quantization} against bf16, times faster"
                found.append(Figure(f"{quantization}_{kind}_{size}_gain", label, gain, goal))
    return sorted(found, key=lambda figure: figure.label)


def _gain_goal(kind: str, size: int) -> float | None:
    if kind == "decode":
        return DECODE_GAIN_GOAL if size == 1 else None
    return PREFILL_GAIN_GOAL if 2000 <= size <= LONG_PREFILL else None


def table(inside: Inside) -> str:
    """Markdown."""
    lines = ["| the engine alone | | goal | |", "|---|---:|---:|---|"]
    for figure in figures(inside):
        is_share = figure.key.endswith("share")
        value, goal = (_cell(number, is_share) for number in (figure.value, figure.goal))
        lines.append(f"| {figure.label} | {value} | {goal} | {figure.verdict} |")
    return "\n".join(lines)


def _cell(value: float | None, is_share: bool) -> str:
    return "" if value is None else f"{value:.1%}" if is_share else f"{value:.2f}"


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Files that `engine_step --json` wrote, by their quantization."""
    return {str(result["quantization"]): result for result in results}
