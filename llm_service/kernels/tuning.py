"""Measures every candidate of the small products; the best go to stdout, to JSON and to their source file."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from llm_service.kernels import table_bf16, table_float8
from llm_service.kernels.cases import SHAPES, Case, Operands, cublas
from llm_service.kernels.linear_config import MAX_GEMV_ROWS, Config, Table
from llm_service.kernels.linear_small import SmallLinear

# What matters most comes first: a run may end before the last ones.
ROW_CLASSES = (1, 64, 16, 2, 32, 4)
KEPT = 4  # results of a case that go into the JSON


@dataclass(frozen=True)
class Tuned:
    """Microseconds of what was measured for one case, best first; None is the library."""

    case: Case
    results: list[tuple[float, Config | None]]

    @property
    def key(self) -> tuple[int, int, int]:
        return self.case.rows, self.case.n, self.case.k

    @property
    def best(self) -> Config | None:
        """Of W in float8 and few rows never the library, which would round x to float8, too."""
        exact = self.case.float8 and self.case.rows <= MAX_GEMV_ROWS
        return next(config for _, config in self.results if config is not None or not exact)

    def as_json(self) -> dict[str, object]:
        library = next(us for us, config in self.results if config is None)
        kept = [
            {"us": round(us, 2), "config": None if config is None else asdict(config)}
            for us, config in self.results[:KEPT]
        ]
        rows, n, k = self.key
        return {"rows": rows, "n": n, "k": k, "library_us": round(library, 2), "best": kept}


def tune(float8: bool, budget_s: float, json_path: Path | None, write: bool) -> None:
    """Print the table, keep the measurements in `json_path`, and with `write` the table in its source file.

    What does not fit the budget keeps the entries that it has.
    """
    module = table_float8 if float8 else table_bf16
    table, measured = dict(module.TABLE), []
    for tuned in _measure_all(float8, time.monotonic() + budget_s):
        table[tuned.key] = tuned.best
        measured.append(tuned.as_json())
        print(json.dumps(measured[-1]), flush=True)
    text = source(table, float8)
    print(text, flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if write:
        assert module.__file__ is not None
        Path(module.__file__).write_text(text, encoding="utf-8")


def source(table: Table, float8: bool) -> str:
    """The Python file that holds a table."""
    weights = " --weights fp8" if float8 else ""
    kinds = sorted({type(config).__name__ for config in table.values() if config is not None})
    lines = [f"    {key}: {config},\n" for key, config in sorted(table.items(), key=_by_shape)]
    return (
        f'"""Measured by `python -m llm_service.kernels.timing --tune{weights} --write`."""\n\n'
        f"from llm_service.kernels.linear_config import {', '.join(sorted((*kinds, 'Table')))}\n\n"
        f"TABLE: Table = {{\n{''.join(lines)}}}\n"
    )


def _by_shape(item: tuple[tuple[int, int, int], Config | None]) -> tuple[int, int, int]:
    rows, n, k = item[0]
    return n, k, rows


def _measure_all(float8: bool, ends_at: float) -> Iterator[Tuned]:
    """Row class by row class, as long as another one should fit."""
    # Compiled in processes of their own, or it would take minutes; measured when none of them runs.
    context = multiprocessing.get_context("spawn")
    longest = 0.0
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        for rows in ROW_CLASSES:
            started = time.monotonic()
            if started + longest > ends_at:
                print(f"no time for {rows} rows and what would follow", flush=True)
                return
            cases = [Case(rows, *shape, float8) for shape in SHAPES.values()]
            jobs = [(case, config) for case in cases for config in case.candidates()]
            list(pool.map(_compile, jobs))
            yield from map(measure, cases)
            longest = max(longest, time.monotonic() - started)


def measure(case: Case) -> Tuned:
    """Every candidate that fits the GPU, and the library."""
    operands, linear = Operands.of(case), SmallLinear(torch.device("cuda"))
    library = linear.rounded if case.float8 else cublas
    results: list[tuple[float, Config | None]] = [(operands.us(library), None)]
    for config in case.candidates():
        us = operands.us_or_none(partial(_run, linear, config))
        if us is not None:
            results.append((us, config))
    return Tuned(case, sorted(results, key=lambda result: result[0]))


def _run(
    linear: SmallLinear,
    config: Config,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    return linear.run(x, weight, bias, config, scale)


def _compile(job: tuple[Case, Config]) -> None:
    """Into Triton's cache on disk."""
    case, config = job
    operands, linear = Operands.of(case, cold=False), SmallLinear(torch.device("cuda"))
    with suppress(OutOfResources):
        linear.run(operands.x, operands.weights[0], operands.bias, config, operands.scales[0])
    torch.cuda.synchronize()
