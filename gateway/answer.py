"""The events of one answer on their way to its reader: kept until they are taken, joined if that is late.

Knows neither protobuf nor JSON.
"""

from __future__ import annotations

import asyncio

from gateway.events import CallDelta, Delta, Event, Finished, Usage

# So many may wait one by one; for a reader that is further behind they are joined.
MAX_SINGLE_EVENTS = 64


class Answer:
    """One writer that never waits, one reader.  Make it inside a running event loop."""

    def __init__(self, idle_s: float) -> None:
        """`idle_s`: after so many seconds of silence the reader is told so."""
        self._loop = asyncio.get_running_loop()
        self._idle_s = idle_s
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._silent_since = 0.0
        self._silence: asyncio.TimerHandle | None = None
        self.has_begun = False  # an event has come
        self.has_ended = False  # Usage or an error has come

    def push(self, event: Event) -> None:
        self.has_begun = True
        self._events.append(event)
        if len(self._events) >= MAX_SINGLE_EVENTS:
            self._events = joined(self._events)
        self.has_ended = self.has_ended or type(event) is Usage
        self._wake()

    def fail(self, error: Exception) -> None:
        """The answer ends behind what has come already; ignored when it has ended."""
        if not self.has_ended:
            self._error, self.has_ended = error, True
            self._wake()

    @property
    def has_more(self) -> bool:
        return bool(self._events) or self._error is not None or not self.has_ended

    async def next(self) -> list[Event]:
        """Everything that is there, at least one event; none after `idle_s` seconds without any.

        Raises:
            Exception: what `fail` was given, behind the events before it.
        """
        if not self._events and self._error is None:
            await self._arrival()
        if not self._events and self._error is not None:
            error, self._error = self._error, None
            raise error
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nobody reads any more."""
        if self._silence is not None:
            self._silence.cancel()

    async def _arrival(self) -> None:
        self._silent_since = self._loop.time()
        if self._silence is None:
            self._silence = self._loop.call_later(self._idle_s, self._on_silence)
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _on_silence(self) -> None:
        """One timer an answer, not one a token: it asks since when it is silent."""
        left_s = self._silent_since + self._idle_s - self._loop.time()
        self._silence = None
        if left_s > 0:
            self._silence = self._loop.call_later(left_s, self._on_silence)
        else:
            self._wake()


def joined(events: list[Event]) -> list[Event]:
    """The same answer in as few events as can be: one delta a choice, before its end."""
    heads: list[Event] = []
    deltas: dict[int, list[Delta]] = {}
    tails: list[Event] = []
    for event in events:
        if isinstance(event, Delta):
            deltas.setdefault(event.index, []).append(event)
        elif isinstance(event, Finished | Usage):
            tails.append(event)
        else:
            heads.append(event)
    return [*heads, *(_joined(index, pieces) for index, pieces in deltas.items()), *tails]


def _joined(index: int, pieces: list[Delta]) -> Delta:
    return Delta(
        index,
        "".join(piece.text for piece in pieces),
        sum(piece.num_tokens for piece in pieces),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
        "".join(piece.reasoning for piece in pieces),
        _joined_calls([call for piece in pieces for call in piece.calls]),
    )


def _joined_calls(pieces: list[CallDelta]) -> tuple[CallDelta, ...]:
    """One a call: its name is in its first piece if it is there at all."""
    calls: dict[int, list[CallDelta]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return tuple(
        CallDelta(index, "".join(piece.arguments for piece in of_call), of_call[0].name)
        for index, of_call in calls.items()
    )
