"""The GPU benchmark's results against targets and peers: tables, and files that keep them.

`python -m deploy.bench.report RESULT.json... --out STEM`: joins results of several runs, the last wins where
two have the same level, and writes STEM.json, STEM.md and STEM.svg. `--float8` names the result of a run with
`--quantization fp8`, `--inside` those of deploy.bench.engine_step; the report then has tables of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bench import inside, plot, stages
from deploy.bench.workload import WORKLOADS

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
PEERS = BENCHMARKS / "peers_h200.json"
PEERS_GPU = "H200"
# Of the mean prompt: another tokenizer or template makes the comparison meaningless.
PROMPT_TOLERANCE = 0.03

Result = dict[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One line of the table: a figure of a workload at a number of streams."""

    label: str
    workload: str
    concurrency: int
    figure: str  # key of the level's row
    unit: str
    goal: float

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "ms"

    def gain(self, value: float, over: float) -> float:
        """How many times better `value` is."""
        return over / value if self.lower_is_better else value / over

    def read(self, rows: Sequence[Row], level: str) -> float | None:
        """The figure among a workload's rows, None for no or no positive one (all text came at once).

        `level` is the key of the number of streams.
        """
        for row in rows:
            if row[level] == self.concurrency and row.get(self.figure):
                return float(row[self.figure])
        return None


TARGETS = (
    Target("text, 1 stream, time per output token", "text", 1, "tpot_p50_ms", "ms", 4.1),
    Target("text, 64 streams, throughput", "text", 64, "out_tok_s", "tokens/s", 11300),
    Target("text, 256 streams, throughput", "text", 256, "out_tok_s", "tokens/s", 20500),
    Target("one 1024x1024 picture, 1 stream, time to first token", "1img", 1, "ttft_p50_ms", "ms", 95),
    Target("one 1024x1024 picture, 64 streams, throughput", "1img", 64, "req_s", "requests/s", 10.4),
    Target("four 1344x896 pictures, 1 stream, time to first token", "4img", 1, "ttft_p50_ms", "ms", 245),
    Target("four 1344x896 pictures, 16 streams, throughput", "4img", 16, "req_s", "requests/s", 4.1),
)
FIGURES = (
    ("ttft_p50_ms", "first token p50, ms"),
    ("ttft_p99_ms", "p99"),
    ("tpot_p50_ms", "a token p50, ms"),
    ("tpot_p99_ms", "p99"),
    ("out_tok_s", "tokens/s"),
    ("req_s", "requests/s"),
)


@dataclass(frozen=True)
class Line:
    """A target with what was measured."""

    target: Target
    peers: dict[str, float]  # by name
    measured: float | None
    comparable: bool  # the same work on the same hardware

    @property
    def best_peer(self) -> float:
        values = self.peers.values()
        return min(values) if self.target.lower_is_better else max(values)

    @property
    def ratio(self) -> float | None:
        """Times better than the best peer."""
        return None if self.measured is None else self.target.gain(self.measured, self.best_peer)

    @property
    def reached(self) -> bool:
        return (
            self.comparable
            and self.measured is not None
            and self.target.gain(self.measured, self.target.goal) >= 1
        )


@dataclass(frozen=True)
class Complaint:
    """Why the figures of one level cannot stand beside the peers'."""

    workload: str
    concurrency: int
    text: str

    def __str__(self) -> str:
        streams = "stream" if self.concurrency == 1 else "streams"
        return f"**Not comparable**: {self.workload}, {self.concurrency} {streams}: {self.text}"


def read_peers(path: Path = PEERS) -> dict[str, Any]:
    peers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return peers


def read_result(path: Path) -> Result:
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def compare(result: Result, peers: Mapping[str, Any]) -> list[Line]:
    """Every target, measured or not."""
    worthless = {(found.workload, found.concurrency) for found in complaints(result, peers)}
    lines = []
    for target in TARGETS:
        figures = {name: target.read(rows[target.workload], "c") for name, rows in peers["peers"].items()}
        known = {name: value for name, value in figures.items() if value is not None}
        measured = target.read(result["workloads"].get(target.workload, ()), "concurrency")
        comparable = (target.workload, target.concurrency) not in worthless
        lines.append(Line(target, known, measured, comparable))
    return lines


def complaints(result: Result, peers: Mapping[str, Any]) -> list[Complaint]:
    """What makes figures worthless: other hardware, other work, failed requests."""
    return [
        Complaint(workload, row["concurrency"], text)
        for workload, rows in result["workloads"].items()
        for row in rows
        for text in _flaws(row, workload, peers["prompt_tokens"][workload], result["machine"]["gpu"])
    ]


def _flaws(row: Row, workload: str, prompt_tokens: int, gpu: str) -> Iterator[str]:
    asked, num_requests = WORKLOADS[workload], WORKLOADS[workload].requests_at(row["concurrency"])
    if PEERS_GPU not in gpu:
        yield f"measured on {gpu}, not on an {PEERS_GPU}"
    if row["errors"]:
        yield f"{row['errors']} of {row['requests']} requests failed: {row['first_error']}"
    if row["requests"] != num_requests:
        yield f"{row['requests']} requests, not {num_requests}"
    if abs(row["in_tok"] - prompt_tokens) > PROMPT_TOLERANCE * prompt_tokens:
        yield f"prompts of {row['in_tok']} tokens, not {prompt_tokens}"
    if row["out_tok"] != asked.max_tokens:
        yield f"answers of {row['out_tok']} tokens, not {asked.max_tokens}"


def markdown(result: Result, peers: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [_machine_line(result), _target_table(compare(result, peers))]
    found = complaints(result, peers)
    parts += ["\n".join(f"- {complaint}" for complaint in found)] if found else []
    if result.get("inside"):
        parts.append(inside.table(result["inside"]))
    if result.get("float8"):
        parts.append(float8_table(result, result["float8"]))
    parts += [_level_table(name, rows) for name, rows in result["workloads"].items() if rows]
    if result.get("stages"):
        parts.append("Where each millisecond of a request goes, one request at a time:")
        parts.append(stages.table(result["stages"]))
    return "\n\n".join(parts) + "\n"


def write(result: Result, stem: Path) -> None:
    """STEM.json, STEM.md and STEM.svg."""
    peers = read_peers()
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = {
        "json": json.dumps(result, indent=1) + "\n",
        "md": markdown(result, peers),
        "svg": plot.draw(_bars(result, peers), _machine_line(result)),
    }
    for suffix, text in files.items():
        Path(f"{stem}.{suffix}").write_text(text, encoding="utf-8")


def join(results: Sequence[Result]) -> Result:
    """One result of several runs: machine and commit are the last one's, those of others are kept beside."""
    joined: Result = dict(results[-1]) | {"workloads": {}, "stages": {}}
    for key in ("inside", "float8"):
        kept = [result[key] for result in results if result.get(key)]
        joined |= {key: kept[-1]} if kept else {}
    for result in results:
        joined["stages"] |= result.get("stages") or {}
        for workload, rows in result["workloads"].items():
            levels = {row["concurrency"]: row for row in joined["workloads"].get(workload, ())}
            levels |= {row["concurrency"]: row for row in rows}
            joined["workloads"][workload] = [levels[level] for level in sorted(levels)]
    commits = sorted({result["machine"]["commit"] for result in results})
    return joined | ({"commits": commits} if len(commits) > 1 else {})


def _machine_line(result: Result) -> str:
    machine = result["machine"]
    words = [machine["gpu"], f"driver {machine['driver']}" if machine.get("driver") else ""]
    words += [f"torch {machine['torch']}", f"triton {machine['triton']}" if machine.get("triton") else ""]
    words += [f"commit {', '.join(result.get('commits') or [machine['commit']])}", machine["date"]]
    return ", ".join(word for word in words if word)


def _target_table(lines: Sequence[Line]) -> str:
    names = list(lines[0].peers)
    head = " | ".join(("", *names, "target", "Tessera", "ratio to the best peer", ""))
    rows = [f"|{head} |", "|---|" + "---:|" * (len(names) + 3) + "---|"]
    for line in lines:
        sign = "<=" if line.target.lower_is_better else ">="
        cells = [
            f"{line.target.label}, {line.target.unit}",
            *(_number(line.peers.get(name)) for name in names),
        ]
        cells += [f"{sign} {_number(line.target.goal)}", f"**{_number(line.measured)}**"]
        cells += ["" if line.ratio is None else f"{line.ratio:.2f}", _verdict(line)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def float8_table(result: Result, float8: Result) -> str:
    """Every figure that a run with float8 weights has, too."""
    rows = ["| | streams | | bf16 | fp8 | times better |", "|---|---:|---|---:|---:|---:|"]
    for workload, levels in float8["workloads"].items():
        plain = {row["concurrency"]: row for row in result["workloads"].get(workload, ())}
        for row in levels:
            beside = plain.get(row["concurrency"], {})
            for figure, label in FIGURES:
                ours, theirs = beside.get(figure), row.get(figure)
                if not ours or not theirs or "p99" in figure:
                    continue
                gain = ours / theirs if figure.endswith("_ms") else theirs / ours
                cells = (workload, str(row["concurrency"]), label, _number(ours), _number(theirs))
                rows.append("| " + " | ".join((*cells, f"{gain:.2f}")) + " |")
    return "\n".join(rows)


def _verdict(line: Line) -> str:
    if line.measured is None:
        return "not measured"
    if not line.comparable:
        return "not comparable"
    return "reached" if line.reached else "missed"


def _level_table(workload: str, rows: Sequence[Row]) -> str:
    head = ["streams", "requests", "errors", "prompt", *(title for _, title in FIGURES)]
    lines = [f"{workload}:", "", "| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for row in rows:
        cells = [str(row["concurrency"]), str(row["requests"]), str(row["errors"]), _number(row["in_tok"])]
        cells += [_number(row.get(figure)) for figure, _ in FIGURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bars(result: Result, peers: Mapping[str, Any]) -> list[plot.Group]:
    """Speeds relative to the best peer; only what can be compared."""
    groups = []
    for line in compare(result, peers):
        if line.measured is None or line.ratio is None or not line.comparable:
            continue
        gain, best, unit = line.target.gain, line.best_peer, line.target.unit
        bars = [
            plot.Bar(name, gain(value, best), f"{_number(value)} {unit}")
            for name, value in line.peers.items()
        ]
        bars.append(plot.Bar("Tessera", line.ratio, f"{_number(line.measured)} {unit}"))
        groups.append(plot.Group(line.target.label, tuple(bars), gain(line.target.goal, best)))
    return groups


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    parser.add_argument("--float8", type=Path, help="the result of a run with --quantization fp8")
    parser.add_argument("--inside", type=Path, nargs="*", default=[], help="files of engine_step --json")
    arguments = parser.parse_args(argv)
    joined = join([read_result(path) for path in arguments.results])
    if arguments.float8 is not None:
        joined["float8"] = read_result(arguments.float8)
    if arguments.inside:
        joined["inside"] = inside.join([read_result(path) for path in arguments.inside])
        joined["figures"] = {
            figure.key: round(figure.value, 4) for figure in inside.figures(joined["inside"])
        }
    write(joined, arguments.out)
    print(markdown(joined, read_peers()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
