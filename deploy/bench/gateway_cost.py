"""What the gateway costs: CPU an event and a token, time added to a picture, time until a disconnect counts.

A scripted language model stands behind the real gateway; it, the gateway, the load and the yardstick are
processes of their own.  CPU times are those of /proc, so this runs on Linux.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deploy.bench import disconnect, front_end_load, picture_load
from deploy.bench.child_processes import ChildProcesses
from deploy.bench.disconnect import Disconnects
from deploy.bench.front_end_load import Load, LoadResult
from deploy.bench.picture_load import PictureLoad, PictureTimes

MODEL = "bench"
STREAMS = 64
STEP_S = 0.02
MAX_TOKENS = 256
PROMPT_WORDS = 30
COALESCED_STEPS = 4  # a message, as when the front end joins what waits to be sent
PICTURE_BYTES = 1 << 20
# Promised, on two cores.
MOST_EVENT_US = 75.0
MOST_TOKEN_US = 25.0
MOST_ADDED_MS = 1.5
MOST_DISCONNECT_MS = 50.0


@dataclass(frozen=True)
class Cost:
    load: LoadResult
    gateway_s: float  # CPU time, user and system, all threads

    @property
    def event_us(self) -> float:
        """Of an SSE event with text; those around an answer are part of the cost and not of the count."""
        return self.gateway_s / self.load.chunks * 1e6

    @property
    def token_us(self) -> float:
        return self.gateway_s / self.load.tokens * 1e6


class GatewayStack:
    """Scripted language model, gateway, bare route, each ready when the constructor returns."""

    def __init__(self) -> None:
        self._children = ChildProcesses()
        self._children.start("llm", "deploy.bench.scripted_llm", MODEL)
        target = f"127.0.0.1:{self._children.read_line('llm')}"
        self._children.start("bare", "deploy.bench.bare_route")
        self._bare_port = int(self._children.read_line("bare"))
        address = self._children.start_service("gateway", "gateway", f"--llm={target}")
        self._host, _, port = address.rpartition(":")
        self._port = int(port)

    def stream(self, streams: int, requests: int, step_s: float, steps_a_message: int, tokens: int) -> Cost:
        start_s = self._set_pace(step_s, steps_a_message)
        load = Load(self._host, self._port, MODEL, streams, requests, tokens, PROMPT_WORDS, start_s, step_s)
        before = self._children.cpu_s()["gateway"]
        result = front_end_load.run_apart(load)
        return Cost(result, self._children.cpu_s()["gateway"] - before)

    def show_pictures(self, requests: int, picture_bytes: int) -> PictureTimes:
        self._set_pace(0, 1)
        load = PictureLoad(self._host, self._port, self._bare_port, MODEL, picture_bytes, requests)
        return picture_load.run_apart(load)

    def close(self) -> None:
        self._children.close()

    def _set_pace(self, step_s: float, steps_a_message: int) -> float:
        self._children.write_line("llm", f"{step_s} {steps_a_message}")
        return float(self._children.read_line("llm"))


def run(
    checkpoint: Path,
    streams: int = STREAMS,
    requests: int = 2,
    max_tokens: int = MAX_TOKENS,
    step_s: float = STEP_S,
    pictures: int = 100,
    disconnects: int = 20,
) -> bool:
    """Print all four; True when each is within what is promised.  The engine serves `checkpoint`."""
    busy = os.getloadavg()[0]  # on a machine that does other things times are longer, CPU times hardly
    print(
        f"gateway, scripted language model, {streams} streams, a step every {step_s * 1e3:g} ms; "
        f"load average before {busy:.1f}"
    )
    with ExitStack() as closing:
        stack = GatewayStack()
        closing.callback(stack.close)
        stack.stream(streams, 1, step_s, 1, 32)
        reached = [
            _print_event(stack.stream(streams, requests, step_s, 1, max_tokens)),
            _print_token(stack.stream(streams, requests, step_s, COALESCED_STEPS, max_tokens)),
            _print_picture(stack.show_pictures(pictures, PICTURE_BYTES)),
        ]
    reached.append(_print_disconnects(disconnect.measure(checkpoint, disconnects)))
    return all(reached)


def _print_event(cost: Cost) -> bool:
    print(f"  one token an event: {_of(cost)}")
    return _print("CPU of an event", cost.event_us, MOST_EVENT_US, "us")


def _print_token(cost: Cost) -> bool:
    print(f"  {COALESCED_STEPS} tokens a message: {_of(cost)}")
    return _print("CPU of a token", cost.token_us, MOST_TOKEN_US, "us")


def _of(cost: Cost) -> str:
    load = cost.load
    return (
        f"{load.tokens} tokens in {load.chunks} events ({load.tokens / load.wall_s:.0f} tokens/s), "
        f"late p50 {load.late_p50_ms:.2f} p99 {load.late_p99_ms:.2f} ms"
    )


def _print_picture(times: PictureTimes) -> bool:
    print(
        f"  request with a picture of {PICTURE_BYTES >> 20} MiB, median: gateway {times.gateway_ms:.2f} ms, "
        f"bare Starlette route {times.bare_ms:.2f} ms"
    )
    return _print("added by the gateway", times.gateway_ms - times.bare_ms, MOST_ADDED_MS, "ms")


def _print_disconnects(found: Disconnects) -> bool:
    print("  clients leave, demo model on one thread: until the engine runs one sequence fewer")
    for kind, drops in (("streamed", found.streamed), ("whole", found.whole)):
        middle, most = statistics.median(drop.ms for drop in drops), max(drop.ms for drop in drops)
        step = max(drop.step_ms for drop in drops)
        print(
            f"    {len(drops)} of {kind} answers: median {middle:.1f}, most {most:.1f} ms, "
            f"longest step meanwhile {step:.1f} ms"
        )
    return _print("until dropped, most", found.most_ms, MOST_DISCONNECT_MS, "ms")


def _print(what: str, value: float, most: float, unit: str) -> bool:
    ratio = value / most
    print(f"  {what:36s}{value:7.2f} {unit}   (promised: <= {most:g} {unit}; {ratio:.2f} of it)")
    return value <= most
