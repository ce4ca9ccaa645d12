"""Many requests on one stream: one message a step with what all of them got.

Knows how requests begin and end on the stream; what happens to one in between is its Generation's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

from llm_service.generation import Generation, GenerationUsage
from llm_service.metrics import count_usage
from llm_service.to_proto import set_event
from protos import language_model_pb2 as pb
from protos.errors import InvalidRequest, ModelError, ServingError, Unavailable
from protos.failures import error_to_failure

DRAINING_RETRY_S = 1.0

log = logging.getLogger(__name__)

MakeGeneration = Callable[[pb.SessionGenerate], tuple[Generation, str]]


@dataclass(eq=False)
class _Request:
    request_id: str = ""
    generation: Generation | None = None
    starting: asyncio.Task[None] | None = None
    error: ServingError | None = None  # of the start

    async def close(self) -> None:
        if self.starting is not None and not self.starting.done():
            self.starting.cancel()
            await asyncio.wait((self.starting,))
        if self.generation is not None:
            await self.generation.close()


class Session:
    """One stream.  `run` yields its messages; leaving it, however, frees all of its requests."""

    def __init__(self, make_generation: MakeGeneration) -> None:
        """`make_generation` gives a request's Generation and id, or raises ServingError."""
        self._make_generation = make_generation
        self._requests: dict[int, _Request] = {}
        self._changed: dict[int, _Request] = {}
        self._wake = asyncio.Event()
        self._draining = False
        self._protocol_error: InvalidRequest | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def drain(self) -> None:
        """Refuse new requests; end the stream behind the last one."""
        self._draining = True
        self._wake.set()

    async def run(self, messages: AsyncIterator[pb.SessionRequest]) -> AsyncGenerator[pb.SessionResponse]:
        """While a message waits to be sent, what comes meanwhile is joined for the next one.

        Raises:
            InvalidRequest: the caller breaks the protocol.
        """
        reading = asyncio.create_task(self._read(messages))
        reading.add_done_callback(lambda _: self._wake.set())
        try:
            while not (self._draining or reading.done()) or self._requests or self._changed:
                await self._wake.wait()
                self._wake.clear()
                if self._protocol_error is not None:
                    raise self._protocol_error
                response = self._response()
                if response.events:
                    yield response
        finally:
            reading.cancel()
            for number in list(self._requests):
                self._end(number)
            await asyncio.gather(*self._closing, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[pb.SessionRequest]) -> None:
        try:
            async for message in messages:
                if message.HasField("generate"):
                    self._begin(message.generate)
                elif message.HasField("cancel"):
                    self._end(message.cancel.id)
                else:
                    raise InvalidRequest("a session request must be generate or cancel")
        except InvalidRequest as error:
            self._protocol_error = error

    def _begin(self, message: pb.SessionGenerate) -> None:
        if message.id in self._requests:
            raise InvalidRequest(f"id {message.id} is that of a running request", field="generate.id")
        request = self._requests[message.id] = _Request()
        if self._draining:
            request.error = Unavailable("the service is stopping", retry_after_s=DRAINING_RETRY_S)
            self._note(message.id)
        else:
            request.starting = asyncio.create_task(self._start(request, message))

    async def _start(self, request: _Request, message: pb.SessionGenerate) -> None:
        try:
            request.generation, request.request_id = self._make_generation(message)
            await request.generation.start(partial(self._note, message.id))
        except ServingError as error:
            self._fail(message.id, request, error)
        except Exception:
            log.exception("unexpected error at the start of a request")
            self._fail(message.id, request, ModelError("internal error; see the server's log"))

    def _fail(self, number: int, request: _Request, error: ServingError) -> None:
        if isinstance(error, ModelError):
            log.error("request failed: %s", error.message)
        request.error = error
        self._note(number)

    def _note(self, number: int) -> None:
        """Something has come for the request; the next message takes it along."""
        request = self._requests.get(number)
        if request is not None:
            self._changed[number] = request
            self._wake.set()

    def _end(self, number: int) -> None:
        """Free what the request holds; only the encoder's streams take a moment to close."""
        self._changed.pop(number, None)
        request = self._requests.pop(number, None)
        if request is not None:
            closing = asyncio.create_task(request.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _response(self) -> pb.SessionResponse:
        response = pb.SessionResponse()
        changed, self._changed = self._changed, {}
        for number, request in changed.items():
            generation, error = request.generation, request.error
            if generation is not None and error is None:
                for event in generation.take():
                    entry = response.events.add()
                    entry.id = number
                    set_event(entry, event, request.request_id)
                    if isinstance(event, GenerationUsage):
                        count_usage(event)
                error = generation.error
            if error is not None:
                response.events.add(id=number, failure=error_to_failure(error))
            if error is not None or (generation is not None and generation.is_over):
                self._end(number)
        return response
