"""One answer as server-sent events: the order is the same for all endpoints, the words are theirs."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from gateway.errors import INTERNAL_MESSAGE
from gateway.events import Batches, Event
from protos.errors import ModelError, ServingError

log = logging.getLogger(__name__)


class AnswerEncoder(Protocol):
    """Turns the events of one answer into the bytes of an endpoint's stream."""

    @property
    def is_admitted(self) -> bool:
        """Whatever goes wrong from here on is not the request's fault."""

    def encode(self, event: Event) -> bytes:
        """Zero or more whole server-sent events."""

    def keepalive(self) -> bytes:
        """What is sent after a while of silence."""

    def end(self) -> bytes:
        """Raises AnswerBrokeOff."""

    def failure(self, error: ServingError) -> bytes:
        """The last bytes of a stream that broke off."""


async def answer_stream(batches: Batches, encoder: AnswerEncoder) -> AsyncGenerator[bytes, None]:
    """Server-sent events of one answer.  What goes wrong before the first is raised, later it is sent."""
    begun = False
    try:
        async with aclosing(batches) as source:
            async for batch in source:
                data = b"".join(map(encoder.encode, batch))
                if not batch and encoder.is_admitted:
                    data = encoder.keepalive()
                if data:
                    begun = True
                    yield data
        yield encoder.end()
    except Exception as error:
        if not begun:
            raise
        yield encoder.failure(_logged(error))


def _logged(error: Exception) -> ServingError:
    if not isinstance(error, ServingError):
        log.exception("unexpected error in a stream")
        return ModelError(INTERNAL_MESSAGE)
    log.warning("stream broke off: %s", error.message)
    return error
