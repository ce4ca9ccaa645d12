"""`make bench-gpu`: the InternVL3-8B shape on one GPU, under the load that the peers were measured with.

Starts what `tessera serve` starts (encoder and language model as two processes, and the gateway), runs the
load generator in a process of its own, and prints the results against targets and peers.  Arguments behind
`--` go to `tessera serve` as they are and win over the ones given here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.bench import machine, report, stages
from deploy.bench.answer import AnswerError
from deploy.bench.load import served_model
from deploy.bench.shapes import write_shape
from deploy.bench.workload import WORKLOADS, Workload
from deploy.cli import UsageError, add_common_arguments
from deploy.progress import Progress
from deploy.serve import ServeCommand, make_supervisor
from deploy.supervisor import PartFailed, Supervisor, free_ports
from protos.checkpoint import open_checkpoint
from protos.preprocessing import Preprocessing

# As the peers were: no cache answers, as many sequences as the largest level has streams.  The visual store
# has room for the tiles of 64 requests with one picture.
SERVE_FLAGS = (
    "--load-format=dummy",
    "--no-enable-prefix-caching",
    "--max-num-seqs=256",
    "--max-num-batched-tokens=8192",
    "--visual-store-gib=2",
    "--served-model-name=internvl3-8b-shape",
    "--port=0",
    "--shutdown-grace-s=5",
    "--llm-shutdown-grace-s=5",
    "--encoder-shutdown-grace-s=5",
)
STDERR_LINES = 30
# Requests fail at once when a service dies; that it died is known when its output has been read.
DEATH_NOTICE_S = 2.0


@dataclass(frozen=True)
class Plan:
    """What to measure, for how long at most."""

    workloads: dict[str, Workload]
    timings: int  # requests per workload of which the stages are measured
    start_timeout_s: float
    level_timeout_s: float
    ends_at: float  # time.monotonic() after which no level begins


class Bench:
    """The measurements of one run, written after every level: a run that is cut short keeps what it has."""

    def __init__(self, plan: Plan, result: report.Result, stem: Path | None) -> None:
        self.plan = plan
        self._stem = stem
        self.result = result

    async def run(self, base_url: str, pages: stages.Pages | None, tokens_per_tile: int) -> None:
        """Measure the server at `base_url`; `pages` are its metrics, if the stages are to be measured.

        Raises:
            AnswerError, OSError, TimeoutError: a level took too long or got no answer, or stages could not be
                measured.
        """
        model = await asyncio.to_thread(served_model, base_url)
        for name, workload in self.plan.workloads.items():
            async with aclosing(self._levels(base_url, model, workload)) as rows:
                async for row in rows:
                    print(name, json.dumps(row), flush=True)
                    self.result["workloads"].setdefault(name, []).append(row)
                    self._keep()
                    if row["errors"] == row["requests"]:
                        raise AnswerError(f"every request of a level failed: {row['first_error']}")
            if pages is not None and self.plan.timings and self._has_time():
                self.result["stages"][name] = await asyncio.wait_for(
                    stages.measure(base_url, model, workload, tokens_per_tile, pages, self.plan.timings),
                    self.plan.level_timeout_s,
                )
                self._keep()

    def _keep(self) -> None:
        if self._stem is not None:
            report.write(self.result, self._stem)

    def _has_time(self) -> bool:
        return time.monotonic() < self.plan.ends_at

    async def _levels(self, base_url: str, model: str, workload: Workload) -> AsyncGenerator[report.Row]:
        """Rows as they come, from a load generator in a process of its own."""
        if not self._has_time():
            return
        command = load_command(base_url, model, workload, self.plan.level_timeout_s)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        try:
            for level in workload.levels:
                if not self._has_time():
                    return
                line = await asyncio.wait_for(process.stdout.readline(), self.plan.level_timeout_s)
                if not line:
                    text = (await errors).decode(errors="replace").splitlines()[-STDERR_LINES:]
                    raise OSError("\n".join([f"the load generator ended at {level} streams", *text]))
                yield json.loads(line)
        except TimeoutError:
            raise TimeoutError(f"a level took more than {self.plan.level_timeout_s:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            errors.cancel()


def load_command(base_url: str, model: str, workload: Workload, timeout_s: float) -> list[str]:
    return [
        *(sys.executable, "-m", "deploy.bench.load", f"--base-url={base_url}", f"--model={model}"),
        f"--images={workload.num_images}",
        f"--size={workload.width}x{workload.height}",
        f"--prompt-words={workload.prompt_words}",
        f"--max-tokens={workload.max_tokens}",
        f"--concurrency={','.join(map(str, workload.levels))}",
        f"--requests={workload.num_requests}",
        f"--timeout={timeout_s}",
    ]


async def serve_and(
    supervisor: Supervisor, start_timeout_s: float, measure: Callable[[str], Awaitable[None]]
) -> None:
    """Start, measure, stop, whatever happens.

    Raises:
        PartFailed: a service did not start or died; its last lines are in the message.
        TimeoutError: they did not become ready.
    """
    try:
        try:
            address = await asyncio.wait_for(supervisor.start(), start_timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the services were not ready within {start_timeout_s:.0f} s") from None
        await _while_alive(supervisor, measure(f"http://{address}/v1"))
    finally:
        await supervisor.stop()


async def _while_alive(supervisor: Supervisor, work: Awaitable[None]) -> None:
    """Run `work`; a service that dies ends it at once.  (An encoder is started again: requests fail.)"""
    watching = asyncio.ensure_future(supervisor.watch())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and working.exception() is not None:
            await asyncio.wait({watching}, timeout=DEATH_NOTICE_S)
        if watching.done():
            await watching
        await working
    except ExceptionGroup as group:  # of the task group that watches
        raise group.exceptions[0] from None
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def measure_served(plan: Plan, bench: Bench, model: Path, serve_flags: Sequence[str]) -> None:
    """Serve `model` and measure it.  Raises UsageError, and what `serve_and` and `Bench.run` raise."""
    llm_port, encoder_port = free_ports(2)
    wired = [f"--llm-metrics-port={llm_port}", f"--encoder-metrics-port={encoder_port}"]
    arguments = _serve_arguments([str(model), *SERVE_FLAGS, *wired, *serve_flags])
    supervisor, _ = make_supervisor(ServeCommand().flags, arguments, Progress(sys.stderr))
    pages = stages.Pages(f"http://127.0.0.1:{llm_port}/metrics", f"http://127.0.0.1:{encoder_port}/metrics")
    tokens_per_tile = Preprocessing.from_checkpoint(open_checkpoint(str(model))).tokens_per_tile
    await serve_and(
        supervisor, plan.start_timeout_s, lambda base_url: bench.run(base_url, pages, tokens_per_tile)
    )


def _serve_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="... --", allow_abbrev=False)
    add_common_arguments(parser, ServeCommand())
    return parser.parse_args(argv)


def choose(arguments: argparse.Namespace) -> dict[str, Workload]:
    """The workloads asked for, cut down as asked.  Raises UsageError."""
    chosen: dict[str, Workload] = {}
    for name in arguments.workloads.split(","):
        if name not in WORKLOADS:
            raise UsageError(f"--workloads: {name!r} is none of {', '.join(WORKLOADS)}")
        workload = WORKLOADS[name]
        if arguments.levels:
            asked = {int(level) for level in arguments.levels.split(",")}
            workload = replace(workload, levels=tuple(n for n in workload.levels if n in asked))
        if arguments.requests:
            workload = replace(workload, num_requests=arguments.requests)
        if arguments.max_tokens:
            workload = replace(workload, max_tokens=arguments.max_tokens)
        if workload.levels:
            chosen[name] = workload
    return chosen


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    add("--levels", default="", help="only these numbers of streams, of those that a workload has")
    add("--requests", type=int, default=0, help="at most so many a level (default: as the peers)")
    add("--max-tokens", type=int, default=0, help="of an answer (default: as the peers)")
    add("--timings", type=int, default=8, help="requests whose stages are measured; 0: none (default: 8)")
    add("--json", type=Path, help="keep the results here, and beside it as .md and .svg")
    add("--bf16", type=Path, help="results of another run: print its rows beside these, which are float8's")
    add("--model", type=Path, help="serve this folder instead of the InternVL3-8B shape")
    add("--base-url", default="", help="measure the server at this URL (.../v1) and start none")
    add("--commit", default="", help="where the tree is a copy without git")
    add("--start-timeout-s", type=float, default=300)
    add("--level-timeout-s", type=float, default=300)
    add("--time-limit-s", type=float, default=float("inf"), help="no level begins after this time")
    return parser


async def run(arguments: argparse.Namespace, serve_flags: Sequence[str], bench: Bench, plan: Plan) -> None:
    if arguments.base_url:
        await bench.run(arguments.base_url, None, 1)
    elif arguments.model is not None:
        await measure_served(plan, bench, arguments.model, serve_flags)
    else:
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
            folder = write_shape(Path(scratch) / "internvl3-8b")
            await measure_served(plan, bench, folder, serve_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every request was answered and everything was measured that was asked for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    own, serve_flags = argv[:split], argv[split + 1 :]
    parser = make_parser()
    arguments = parser.parse_args(own)
    result: report.Result = {
        "machine": machine.describe(arguments.commit),
        "serve_flags": [] if arguments.base_url else [*SERVE_FLAGS, *serve_flags],
        "arguments": own,
        "workloads": {},
        "stages": {},
    }
    stem = arguments.json.with_suffix("") if arguments.json else None
    bench, failure = Bench(_plan(arguments, parser), result, stem), ""
    try:
        asyncio.run(run(arguments, serve_flags, bench, bench.plan))
    except UsageError as error:
        parser.error(str(error))
    except (PartFailed, AnswerError, OSError) as error:  # TimeoutError is an OSError
        failure = f"bench-gpu failed: {error}"
    print(report.markdown(result, report.read_peers()), flush=True)
    if arguments.bf16 is not None:
        print(report.float8_table(report.read_result(arguments.bf16), result), flush=True)
    print(failure or "done", file=sys.stderr, flush=True)
    failed_requests = any(row["errors"] for rows in result["workloads"].values() for row in rows)
    return 1 if failure or failed_requests else 0


def _plan(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    try:
        workloads = choose(arguments)
    except (UsageError, ValueError) as error:
        parser.error(str(error))
    return Plan(
        workloads,
        arguments.timings,
        arguments.start_timeout_s,
        arguments.level_timeout_s,
        time.monotonic() + arguments.time_limit_s,
    )


if __name__ == "__main__":
    raise SystemExit(main())
