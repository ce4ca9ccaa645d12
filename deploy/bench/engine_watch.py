"""How many sequences an engine runs, heard from the engine itself after every step.

A front end of its own on the engine's socket: while it has a sequence there, one message a step comes to it
with the engine's counts, and what other front ends do to the batch shows in them.
"""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path

from llm_service.frame_socket import FrameSocket
from llm_service.messages import AbortRequest, AddRequest, FromEngine, StepOutput
from llm_service.sampling_params import SamplingParams

TIMEOUT_S = 10.0


class EngineWatch:
    def __init__(self, path: Path, num_tokens: int) -> None:
        """`num_tokens`: that a sequence of its own may have."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        self._socket = FrameSocket(connection, FromEngine)
        self._num_tokens = num_tokens
        self._request_id = 0

    def begin(self) -> None:
        """Run a sequence, so that every step says something."""
        self._request_id += 1
        self._socket.send(
            AddRequest(
                request_id=self._request_id,
                prompt_token_ids=[1, 2, 3],
                tiles=[],
                params=SamplingParams(ignore_eos=True),
                stop_token_ids=[],
                max_tokens=self._num_tokens,
                priority=0,
                cache_salt=b"",
            )
        )

    def end(self) -> None:
        """Stop running it; returns when the engine runs nothing."""
        self._socket.send(AbortRequest(self._request_id))
        self.wait_for(0)

    def wait_for(self, num_running: int) -> list[float]:
        """When (CLOCK_MONOTONIC) messages came, up to the first by which so many sequences run.

        Raises:
            TimeoutError: none came in time.
        """
        arrivals_s: list[float] = []
        deadline_s = time.monotonic() + TIMEOUT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            select.select([self._socket], [], [], left_s)
            arrivals_s.append(time.monotonic())
            if any(_num_running(message) == num_running for message in self._socket.receive()):
                return arrivals_s
        raise TimeoutError(f"the engine did not come to {num_running} sequences")

    def read_for(self, seconds: float) -> None:
        """Let time pass without letting messages pile up."""
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            select.select([self._socket], [], [], left_s)
            self._socket.receive()

    def close(self) -> None:
        self._socket.close()


def _num_running(message: FromEngine) -> int | None:
    return message.stats.num_running if isinstance(message, StepOutput) else None
