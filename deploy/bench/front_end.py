"""From the engine's tokens to the client's bytes: what a token costs in each process, and how late it is.

A scripted engine stands for the GPU; language-model service, gateway and client are the real ones, each
in its own process.  CPU times are those of /proc, so this runs on Linux.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.child_processes import ChildProcesses
from deploy.bench.front_end_load import Load, LoadResult, run_apart

# Step times of an 8B model on one H200 at the project's targets: 244, 11,300 and 20,500 tokens a second.
STEP_S = {1: 0.0041, 64: 0.00566, 256: 0.0125}
MAX_TOKENS = 256
PROMPT_WORDS = 30
MODEL = "bench"
# With fewer cores the processes wait for one another, and what is late is joined: not what is to be measured.
CORES_FOR_FULL_SPEED = 8
SLOWDOWN = 8.0
# Prediction at 20,500/s: 15 us a token in the service, 28 in the gateway, 20 of it the kernel's writes.
MOST_OF_A_CORE = 0.8


@dataclass(frozen=True)
class Level:
    streams: int
    load: LoadResult
    cpu_s: dict[str, float]  # by service
    processes: dict[str, int]  # of each service that is measured

    def microseconds(self, name: str) -> float:
        return self.cpu_s[name] / self.load.tokens * 1e6


class Stack:
    """Engine, language models and gateway, each ready when the constructor returns."""

    def __init__(self, checkpoint: Path, folder: Path, num_servers: int, num_workers: int) -> None:
        self._children = ChildProcesses()
        self.processes = {**{f"llm {number}": 1 for number in range(num_servers)}, "gateway": num_workers}
        socket = str(folder / "engine.sock")
        self._children.start("engine", "deploy.bench.scripted_engine", str(checkpoint), socket)
        assert self._children.read_line("engine") == "ready"
        llm = (str(checkpoint), f"--engine-socket={socket}", f"--served-model-name={MODEL}")
        targets = [
            self._children.start_service(f"llm {number}", "llm", *llm, "--encoders=127.0.0.1:1")
            for number in range(num_servers)
        ]
        gateway = (f"--llm={','.join(targets)}", f"--gateway-workers={num_workers}")
        host, _, port = self._children.start_service("gateway", "gateway", *gateway).rpartition(":")
        self.host, self.port = host, int(port)

    def set_step(self, step_s: float) -> float:
        """Returns when step 0 is, CLOCK_MONOTONIC."""
        self._children.write_line("engine", str(step_s))
        return float(self._children.read_line("engine"))

    def cpu_s(self) -> dict[str, float]:
        return self._children.cpu_s()

    def close(self) -> None:
        self._children.close()


def measure(stack: Stack, streams: int, requests: int, step_s: float, max_tokens: int = MAX_TOKENS) -> Level:
    start_s = stack.set_step(step_s)
    load = Load(stack.host, stack.port, MODEL, streams, requests, max_tokens, PROMPT_WORDS, start_s, step_s)
    before = stack.cpu_s()
    result = run_apart(load)
    after = stack.cpu_s()
    cpu_s = {name: after[name] - before[name] for name in before}
    return Level(streams, result, {**cpu_s, "client": result.client_cpu_s}, stack.processes)


def run(
    checkpoint: Path,
    levels: tuple[int, ...] = tuple(STEP_S),
    seconds: float = 8.0,
    slowdown: float = 0.0,
    num_servers: int = 1,
    num_workers: int = 1,
    max_tokens: int = MAX_TOKENS,
) -> bool:
    """Print what each level takes; `slowdown` stretches the engine's steps (0: by the number of cores)."""
    slowdown = slowdown or (1.0 if (os.cpu_count() or 1) >= CORES_FOR_FULL_SPEED else SLOWDOWN)
    print(f"front end, scripted engine, steps {slowdown:g} times as long as an H200's")
    measured = []
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder, ExitStack() as closing:
        stack = Stack(checkpoint, Path(folder), num_servers, num_workers)
        closing.callback(stack.close)
        measure(stack, 8, 2, 0.005, 32)
        for streams in levels:
            step_s = STEP_S[streams] * (slowdown if streams > 1 else 1)
            requests = max(1, round(seconds / (step_s * max_tokens)))
            measured.append(measure(stack, streams, requests, step_s, max_tokens))
            for line in _lines(measured[-1], step_s):
                print(line)
    return _reaches(measured)


def _reaches(levels: list[Level]) -> bool:
    """True when the busiest process would leave enough of its core at the project's rates."""
    busiest = max(
        level.microseconds(name) * level.streams / STEP_S[level.streams] / 1e6 / count
        for level in levels
        for name, count in level.processes.items()
    )
    print(
        f"  share of a core at full speed, busiest process  {busiest:.2f}   (promised: <= {MOST_OF_A_CORE})"
    )
    return busiest <= MOST_OF_A_CORE


def _lines(level: Level, step_s: float) -> list[str]:
    load = level.load
    costs = ", ".join(f"{name} {level.microseconds(name):.1f}" for name in level.cpu_s)
    return [
        f"  {level.streams:3d} streams {load.tokens / load.wall_s:8.0f} tokens/s"
        f" of {level.streams / step_s:.0f}, {load.tokens / load.chunks:.2f} tokens a chunk;"
        f" first token {load.first_token_ms:.1f} ms,"
        f" late p50 {load.late_p50_ms:.2f} p99 {load.late_p99_ms:.2f} ms,"
        f" {load.per_token_ms - step_s * 1e3:+.3f} ms a token",
        f"      CPU us/token: {costs}",
    ]
