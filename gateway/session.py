"""One stream to a language-model service, shared by all requests of this process.

Knows nothing about HTTP, nor about other services.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress

import grpc

from gateway.answer import Answer
from gateway.translate import event_from_proto
from protos import language_model_pb2 as pb
from protos import language_model_pb2_grpc
from protos.errors import Cancelled, ModelError, ServingError, Unavailable
from protos.failures import error_from_failure
from protos.request_context import Metadata

RETRY_AFTER_S = 1.0
_CANCELLED = Cancelled("The language model cancelled the request.")


class Session:
    """Open until it breaks or is closed: answers that have not ended by then fail.  Never opened again."""

    def __init__(
        self,
        stub: language_model_pb2_grpc.LanguageModelStub,
        failure_of: Callable[[grpc.RpcError], ServingError],
    ) -> None:
        """Make it inside a running event loop.  `failure_of` says what a status of the stream means."""
        self._call: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse] = stub.Session()
        self._failure_of = failure_of
        self._ids = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._unsent: dict[int, pb.SessionRequest] = {}
        # Ids of what is unsent, and cancellations.
        self._outbox: asyncio.Queue[int | pb.SessionRequest] = asyncio.Queue()
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))
        self.has_ended = False

    def ask(self, request: pb.GenerateRequest, metadata: Metadata, answer: Answer) -> int:
        """Send the request, whose events go to `answer`; returns its id."""
        assert not self.has_ended
        request_id = next(self._ids)
        self._answers[request_id] = answer
        message = pb.SessionRequest(generate=pb.SessionGenerate(id=request_id, metadata=dict(metadata)))
        message.generate.request.CopyFrom(request)  # one copy of the pictures; a constructor makes several
        self._unsent[request_id] = message
        self._outbox.put_nowait(request_id)
        return request_id

    def leave(self, request_id: int) -> None:
        """Nobody reads this answer any more: the request is cancelled unless the service has ended it.

        One that has not been sent never is, and its pictures are let go: a service that takes nothing may
        keep others waiting for long.
        """
        was_sent = self._unsent.pop(request_id, None) is None
        if self._answers.pop(request_id, None) is not None and was_sent:
            self._outbox.put_nowait(pb.SessionRequest(cancel=pb.SessionCancel(id=request_id)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._end(_CANCELLED)  # a task that had not begun yet has not done it

    async def _read(self) -> None:
        error: ServingError | None = None
        try:
            async for response in self._call:
                for event in response.events:
                    self._deliver(event)
        except grpc.RpcError as status:
            error = self._failure_of(status)
        except asyncio.CancelledError:
            # grpc.aio raises this also when the service ended the stream with CANCELLED.
            error = _CANCELLED
        finally:
            self._tasks[1].cancel()
            self._end(error)

    def _end(self, error: ServingError | None) -> None:
        self.has_ended = True
        self._call.cancel()
        answers, self._answers = self._answers, {}
        self._unsent.clear()
        for answer in answers.values():
            answer.fail(_left_over(answer) if error is None else _copy(error))

    async def _write(self) -> None:
        """gRPC takes one write at a time.  A stream that broke is the reader's to report."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                entry = await self._outbox.get()
                message = self._unsent.pop(entry, None) if isinstance(entry, int) else entry
                if message is not None:
                    await self._call.write(message)

    def _deliver(self, event: pb.SessionEvent) -> None:
        answer = self._answers.get(event.id)
        if answer is None:  # left meanwhile
            return
        if event.HasField("failure"):
            answer.fail(error_from_failure(event.failure))
        else:
            try:
                answer.push(event_from_proto(event))
            except ModelError as error:
                answer.fail(error)
                return  # the service does not know: leaving cancels it
        if answer.has_ended:
            self._answers.pop(event.id)


def _left_over(answer: Answer) -> ServingError:
    """The service ended the stream in good order, but not this answer."""
    if answer.has_begun:
        return ModelError("the language model ended an answer without finishing it")
    return Unavailable("The language model is stopping.", retry_after_s=RETRY_AFTER_S)


def _copy(error: ServingError) -> ServingError:
    """Each request gets its own: whoever handles one writes into it."""
    return type(error)(error.message, field=error.field, retry_after_s=error.retry_after_s)
