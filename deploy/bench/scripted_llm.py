"""A language-model service without a model: every running request gets letters, so many a message.

`python -m deploy.bench.scripted_llm MODEL` prints its port.  Each line on stdin is a step time in seconds and
the number of steps that one message carries; it starts the count of steps anew and is answered with the time
of step 0 (CLOCK_MONOTONIC).  Step k is due `k * step_s` later, its tokens are letter `k % len(LETTERS)`; a
message is sent when its last step is due.  With a step time of 0 a request has its whole answer at once.
Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop

from deploy.bench.letters import LETTERS
from protos import language_model_pb2 as pb
from protos import language_model_pb2_grpc
from protos.malloc import tune_malloc
from protos.server import Server, ServerConfig

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LanguageModel"].full_name
PROMPT_TOKENS = 7


@dataclass(eq=False)
class _Session:
    """One stream of a gateway."""

    outbox: asyncio.Queue[pb.SessionResponse] = field(default_factory=asyncio.Queue)
    left: dict[int, int] = field(default_factory=dict)  # request -> tokens still to come
    asked: dict[int, int] = field(default_factory=dict)  # request -> tokens in all

    def begin(self, generate: pb.SessionGenerate, at_once: bool) -> None:
        """`at_once`: the whole answer goes in one message, which is as little as a service can take."""
        max_tokens = generate.request.sampling.max_tokens
        self.left[generate.id] = self.asked[generate.id] = max_tokens
        started = pb.Started(request_id=generate.request.request_id, prompt_tokens=PROMPT_TOKENS)
        response = pb.SessionResponse(events=[pb.SessionEvent(id=generate.id, started=started)])
        if at_once:
            self._add(response, generate.id, LETTERS[0] * max_tokens)
        self.outbox.put_nowait(response)

    def forget(self, request_id: int) -> None:
        self.left.pop(request_id, None)
        self.asked.pop(request_id, None)

    def emit(self, first_step: int, num_steps: int) -> None:
        """One message with the letters of these steps for every running request."""
        if not self.left:
            return
        response = pb.SessionResponse()
        text = "".join(LETTERS[step % len(LETTERS)] for step in range(first_step, first_step + num_steps))
        for request_id, left in list(self.left.items()):
            self._add(response, request_id, text[:left])
        self.outbox.put_nowait(response)

    def _add(self, response: pb.SessionResponse, request_id: int, text: str) -> None:
        event = response.events.add(id=request_id)
        event.delta.text = text
        event.delta.token_ids.extend(range(len(text)))
        self.left[request_id] -= len(text)
        if self.left[request_id]:
            return
        finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH)
        response.events.add(id=request_id, finished=finished)
        usage = pb.Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=self.asked[request_id])
        response.events.add(id=request_id, usage=usage)
        self.forget(request_id)


class ScriptedLLM(language_model_pb2_grpc.LanguageModelServicer):
    """Make it inside a running event loop."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._sessions: set[_Session] = set()
        self._emitting: asyncio.Task[None] | None = None

    def set_pace(self, step_s: float, steps_a_message: int) -> float:
        """Returns when step 0 is."""
        start_s = time.monotonic()
        if self._emitting is not None:
            self._emitting.cancel()
            self._emitting = None
        if step_s:
            self._emitting = asyncio.create_task(self._emit(start_s, step_s, steps_a_message))
        return start_s

    async def _emit(self, start_s: float, step_s: float, steps_a_message: int) -> None:
        step = 0
        while True:
            due_s = start_s + (step + steps_a_message - 1) * step_s
            while (left_s := due_s - time.monotonic()) > 0:  # uvloop's timers are up to 1 ms early
                await asyncio.sleep(left_s)
            for session in self._sessions:
                session.emit(step, steps_a_message)
            step += steps_a_message

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SessionResponse]:
        session = _Session()
        self._sessions.add(session)
        reading = asyncio.create_task(self._read(session, requests))
        try:
            while True:
                yield await session.outbox.get()
        finally:
            reading.cancel()
            self._sessions.discard(session)

    async def _read(self, session: _Session, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for message in requests:
            if message.HasField("cancel"):
                session.forget(message.cancel.id)
                continue
            session.begin(message.generate, at_once=self._emitting is None)

    async def GetModel(
        self, request: pb.GetLanguageModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLanguageModelResponse:
        return pb.GetLanguageModelResponse(
            model=self._model,
            max_model_len=1 << 15,
            max_images=4,
            max_request_bytes=32 << 20,
            max_tiles=12,
            encoders_ready=1,
            sequences_running=sum(len(session.left) for session in self._sessions),
        )


async def main(model: str) -> None:
    servicer = ScriptedLLM(model)
    server = Server(ServerConfig(), [SERVICE_NAME])
    language_model_pb2_grpc.add_LanguageModelServicer_to_server(servicer, server.grpc)
    port = await server.start()
    await server.set_serving()
    print(port, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        step_s, steps_a_message = line.split()
        print(servicer.set_pace(float(step_s), int(steps_a_message)), flush=True)
    servicer.set_pace(0, 1)
    with suppress(asyncio.CancelledError):
        await server.grpc.stop(0)


if __name__ == "__main__":
    tune_malloc()
    uvloop.run(main(sys.argv[1]))
