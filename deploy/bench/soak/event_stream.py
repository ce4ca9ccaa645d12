"""The events of one streamed chat completion, checked as they come: order, ends, usage."""

from __future__ import annotations

import json

from deploy.bench.soak.unexpected import Unexpected

DATA = b"data: "
DONE = b"[DONE]"


class EventStream:
    """Feed it the body; `texts` and `finish_reasons` are those of the choices by number."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.finish_reasons: dict[int, str] = {}
        self.has_usage = False
        self._is_done = False
        self._unread = b""

    def feed(self, data: bytes) -> None:
        """Raises Unexpected: an error among the events, or one that breaks the order."""
        *events, self._unread = (self._unread + data).split(b"\n\n")
        for event in events:
            if event.startswith(b":"):
                continue
            if self._is_done or not event.startswith(DATA):
                raise Unexpected(f"an event out of place: {event[:200]!r}")
            if event[len(DATA) :] == DONE:
                self._is_done = True
            else:
                self._read(event[len(DATA) :])

    def _read(self, event: bytes) -> None:
        chunk = json.loads(event)
        if "error" in chunk:
            raise Unexpected(f"an error in the stream: {event[:500]!r}")
        self.has_usage = self.has_usage or chunk.get("usage") is not None
        for choice in chunk["choices"]:
            index = choice["index"]
            if index in self.finish_reasons:
                raise Unexpected(f"choice {index} goes on behind its end: {event[:200]!r}")
            self.texts[index] = self.texts.get(index, "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"] is not None:
                self.finish_reasons[index] = choice["finish_reason"]

    def check_end(self, num_choices: int) -> None:
        """Raises Unexpected: the body ended too early."""
        if not self._is_done or self._unread or not self.has_usage:
            raise Unexpected(f"the stream ended without usage or [DONE]; left: {self._unread[:200]!r}")
        if sorted(self.finish_reasons) != list(range(num_choices)):
            raise Unexpected(f"{num_choices} choices, but these ended: {sorted(self.finish_reasons)}")
