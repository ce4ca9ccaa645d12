"""An engine without a model: speaks the engine's socket protocol and gives every sequence one token a step.

`python -m deploy.bench.scripted_engine CHECKPOINT SOCKET` prints "ready".  Each line on stdin is a step time
in seconds; it starts the count of steps anew and is answered with the time of step 0 (CLOCK_MONOTONIC).
Step k is due `k * step_s` later and its tokens are letter `k % len(LETTERS)`, so that whoever reads the text
knows when each token was due.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deploy.bench.letters import LETTERS
from llm_service.engine_listener import EngineListener
from llm_service.frame_socket import FrameSocket, encode_frame
from llm_service.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    RequestAccepted,
    SequenceOutput,
    StepOutput,
    ToEngine,
    TokenOutput,
)
from llm_service.tokenizer import Tokenizer, load_tokenizer
from llm_service.visual_memory import VisualMemory
from protos.checkpoint import open_checkpoint
from protos.fingerprint import language_digest

IDLE_STEP_S = 0.005


@dataclass(eq=False)
class _FrontEnd:
    socket: FrameSocket
    left: dict[int, int] = field(default_factory=dict)  # request -> tokens still to come


class ScriptedEngine:
    """One thread: front ends' requests in, one message a step and front end out."""

    def __init__(
        self, listener: socket.socket, ready: EngineReady, visual_fd: int, letters: list[int]
    ) -> None:
        self._listener = listener
        self._ready = ready
        self._visual_fd = visual_fd
        self._letters = letters
        self._front_ends: list[_FrontEnd] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._set_step)
        self._start_s, self._step_s, self._step = time.monotonic(), IDLE_STEP_S, 0
        self._stopped = False

    def run(self) -> None:
        """Until stdin ends."""
        while not self._stopped:
            due_s = self._start_s + self._step * self._step_s
            for key, _ in self._selector.select(max(due_s - time.monotonic(), 0)):
                key.data()
            if time.monotonic() >= self._start_s + self._step * self._step_s:
                self._emit()

    def _set_step(self) -> None:
        line = sys.stdin.readline()
        self._stopped = not line
        if line:
            self._start_s, self._step_s, self._step = time.monotonic(), float(line), 0
            print(self._start_s, flush=True)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        front_end = _FrontEnd(FrameSocket(connection, ToEngine))
        self._front_ends.append(front_end)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(front_end))
        socket.send_fds(connection, [encode_frame(self._ready)], [self._visual_fd])

    def _read(self, front_end: _FrontEnd) -> None:
        try:
            for message in front_end.socket.receive():
                if isinstance(message, AddRequest):
                    front_end.left[message.request_id] = message.max_tokens
                    front_end.socket.send(RequestAccepted(message.request_id))
                elif isinstance(message, AbortRequest):
                    front_end.left.pop(message.request_id, None)
        except ConnectionError:
            self._front_ends.remove(front_end)
            self._selector.unregister(front_end.socket)
            front_end.socket.close()

    def _emit(self) -> None:
        token = TokenOutput(self._letters[self._step % len(self._letters)], None, [])
        self._step += 1
        running = sum(len(front_end.left) for front_end in self._front_ends)
        stats, now_ns = EngineStats(running, 0, 1, 0), time.monotonic_ns()
        for front_end in self._front_ends:
            outputs = [
                SequenceOutput(request_id, 0, [token], "length" if left == 1 else None, 0, now_ns, 0)
                for request_id, left in front_end.left.items()
            ]
            front_end.left = {request_id: left - 1 for request_id, left in front_end.left.items() if left > 1}
            if outputs:
                front_end.socket.send(StepOutput(outputs, [], stats))


def letter_ids(tokenizer: Tokenizer) -> list[int]:
    """The token of each of LETTERS."""
    ids = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [ids[letter.encode()] for letter in LETTERS]


def main() -> None:
    checkpoint = open_checkpoint(sys.argv[1])
    tokenizer = load_tokenizer(checkpoint.folder)
    memory = VisualMemory.create(1, 1, 8, torch.float32)
    ready = EngineReady(
        max_model_len=1 << 15,
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        dtype="float32",
        num_slots=1,
        slot_tokens=1,
        num_blocks=1,
        block_size=16,
        language_digest=language_digest(checkpoint),
    )
    listener = EngineListener(Path(sys.argv[2]))
    listener.publish()
    print("ready", flush=True)
    ScriptedEngine(listener.socket, ready, memory.fd, letter_ids(tokenizer)).run()
    listener.close()


if __name__ == "__main__":
    main()
