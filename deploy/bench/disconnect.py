"""From a client's closed connection to the engine's batch without its sequence, through the real services.

The engine runs the demo model on one CPU thread and, beside the client's sequence, one of the watch
(`engine_watch.py`).  The time ends with the message of the first step that runs one sequence fewer, so the
rest of the running step is in it, and the step after.  One thread: two that wait for one another make steps
of hundreds of milliseconds where processes share two cores, and those say nothing about disconnects.
"""

from __future__ import annotations

import random
import socket
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from deploy.bench.chat_request import chat_request
from deploy.bench.child_processes import ChildProcesses
from deploy.bench.engine_watch import EngineWatch

MODEL = "bench"
# Far more than a round takes: neither the client's sequence nor the watch's may end by itself.
NUM_TOKENS = 3500
SPREAD_S = 0.05  # clients leave at any time between two steps


@dataclass(frozen=True)
class Drop:
    ms: float  # from the closed connection to the engine's word
    step_ms: float  # of it the longest time between two messages of the engine


@dataclass(frozen=True)
class Disconnects:
    streamed: list[Drop]
    whole: list[Drop]  # of requests whose answer is awaited whole

    @property
    def most_ms(self) -> float:
        return max(drop.ms for drop in self.streamed + self.whole)


class EngineStack:
    """Engine, language model and gateway, each ready when the constructor returns."""

    def __init__(self, checkpoint: Path, folder: Path, num_tokens: int) -> None:
        self._children = ChildProcesses()
        path = folder / "engine.sock"
        llm = (str(checkpoint), f"--engine-socket={path}", f"--served-model-name={MODEL}")
        target = self._children.start_service("llm", "llm", *llm, "--encoders=127.0.0.1:1", "--num-threads=1")
        address = self._children.start_service("gateway", "gateway", f"--llm={target}")
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._num_tokens = num_tokens
        self._watch = EngineWatch(path, num_tokens)
        self._numbers = random.Random(0)

    def leave(self, streamed: bool) -> Drop:
        """One disconnect."""
        self._watch.begin()
        self._watch.wait_for(1)
        with socket.create_connection(self._address) as client:
            client.sendall(self._request(streamed))
            self._watch.wait_for(2)
            if streamed:
                client.recv(1)
            self._watch.read_for(self._numbers.uniform(0, SPREAD_S))
            left_s = time.monotonic()
        arrivals_s = [left_s, *self._watch.wait_for(1)]
        self._watch.end()
        steps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
        return Drop((arrivals_s[-1] - left_s) * 1e3, max(steps_s) * 1e3)

    def close(self) -> None:
        self._watch.close()
        self._children.close()

    def _request(self, streamed: bool) -> bytes:
        messages = [{"role": "user", "content": "Tell me a long story."}]
        options = {"stream": streamed, "max_tokens": self._num_tokens, "ignore_eos": True}
        return chat_request({"model": MODEL, "messages": messages, **options})


def measure(checkpoint: Path, rounds: int, num_tokens: int = NUM_TOKENS) -> Disconnects:
    """`rounds` disconnects of either kind, in turns."""
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder, ExitStack() as closing:
        stack = EngineStack(checkpoint, Path(folder), num_tokens)
        closing.callback(stack.close)
        stack.leave(streamed=True)  # what is done once: the session, buffers, imports
        drops = [stack.leave(streamed) for _ in range(rounds) for streamed in (True, False)]
    return Disconnects(streamed=drops[::2], whole=drops[1::2])
