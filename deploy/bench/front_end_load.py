"""Streams of chat completions over plain sockets, read with as little work as possible.

`python -m deploy.bench.front_end_load` reads one Load as JSON from stdin and prints one LoadResult as JSON.
The letters of the answers are those of `scripted_engine`: they say when each token was due.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import cast

import uvloop

from deploy.bench.chat_request import chat_request
from deploy.bench.child_processes import answer_of
from deploy.bench.letters import LETTERS

_NUMBER_OF = {letter: number for number, letter in enumerate(LETTERS.encode())}
_CONTENT, _END_OF_EVENT, _DONE = b'"content":"', b"\n\n", b"data: [DONE]"


@dataclass(frozen=True)
class Load:
    host: str
    port: int
    model: str
    streams: int
    requests_per_stream: int
    max_tokens: int
    prompt_words: int
    start_s: float  # CLOCK_MONOTONIC of the engine's step 0
    step_s: float


@dataclass(frozen=True)
class LoadResult:
    tokens: int
    chunks: int
    wall_s: float
    first_token_ms: float  # median, from the request
    late_p50_ms: float  # from when a token was due to when it was read
    late_p99_ms: float
    per_token_ms: float  # mean time between tokens of an answer, median over answers
    client_cpu_s: float


@dataclass
class _Seen:
    tokens: int = 0
    chunks: int = 0
    late_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)


class _Stream(asyncio.Protocol):
    """One connection: its requests one after the other."""

    def __init__(self, load: Load, seen: _Seen) -> None:
        self._load, self._seen = load, seen
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = load.requests_per_stream
        self._rest = b""
        self._asked = self._first = self._last = 0.0
        self._tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._ask()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        whole, _, self._rest = (self._rest + data).rpartition(_END_OF_EVENT)
        for piece in whole.split(_CONTENT)[1:]:
            self._take(piece[: piece.index(b'"')], now)
        if _DONE in whole:
            self._end()
        elif b"HTTP/1.1 " in data and b"HTTP/1.1 200" not in data and not self.done.done():
            self.done.set_exception(ConnectionError(data[:2000].decode()))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the gateway closed the connection"))

    def _ask(self) -> None:
        self._left -= 1
        self._tokens, self._first, self._asked = 0, 0.0, time.monotonic()
        self._transport.write(_request(self._load))

    def _take(self, text: bytes, now: float) -> None:
        if not text:
            return
        load, seen = self._load, self._seen
        self._tokens += len(text)
        seen.tokens += len(text)
        seen.chunks += 1
        phase_s = now - load.start_s - _NUMBER_OF[text[-1]] * load.step_s
        seen.late_s.append(phase_s % (len(LETTERS) * load.step_s))
        self._last = now
        if not self._first:
            self._first = now
            seen.first_token_s.append(now - self._asked)

    def _end(self) -> None:
        if self._tokens > 1:
            self._seen.per_token_s.append((self._last - self._first) / (self._tokens - 1))
        if self._left:
            self._ask()
        else:
            self.done.set_result(None)
            self._transport.close()


def _request(load: Load) -> bytes:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": "panda " * load.prompt_words}],
        "stream": True,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    return chat_request(body)


async def run(load: Load) -> LoadResult:
    loop, seen = asyncio.get_running_loop(), _Seen()
    start, cpu = time.monotonic(), time.process_time()
    make = partial(_Stream, load, seen)
    streams = [(await loop.create_connection(make, load.host, load.port))[1] for _ in range(load.streams)]
    await asyncio.gather(*(stream.done for stream in streams))
    late = sorted(seen.late_s)
    return LoadResult(
        tokens=seen.tokens,
        chunks=seen.chunks,
        wall_s=time.monotonic() - start,
        first_token_ms=statistics.median(seen.first_token_s) * 1e3,
        late_p50_ms=late[len(late) // 2] * 1e3,
        late_p99_ms=late[len(late) * 99 // 100] * 1e3,
        per_token_ms=statistics.median(seen.per_token_s) * 1e3,
        client_cpu_s=time.process_time() - cpu,
    )


def run_apart(load: Load) -> LoadResult:
    """In a process of its own; raises RuntimeError with what that said."""
    return LoadResult(**json.loads(answer_of(__name__, json.dumps(asdict(load)))))


def main() -> None:
    load = Load(**json.load(sys.stdin))
    print(json.dumps(asdict(uvloop.run(run(load)))), flush=True)


if __name__ == "__main__":
    main()
