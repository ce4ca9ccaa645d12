"""One streamed chat completion as its bytes arrive: when text came, what it used, whether it failed.

Reads no more than the times need: an event with text is never parsed as JSON, so that the client is not
what a benchmark measures.  Knows HTTP/1.1 and server-sent events; knows nothing about sockets.
"""

from __future__ import annotations

import json
from typing import Any

CONTENT = b'"content":"'
QUOTE = ord('"')
DATA = b"data: "
DONE = b"data: [DONE]"
SHOWN_CHARS = 300


class AnswerError(Exception):
    """The server refused or failed; the message is what it said."""


class Answer:
    """Feed it what a connection receives; times are the caller's clock."""

    def __init__(self) -> None:
        self.first_text_at: float | None = None
        self.last_text_at: float | None = None
        self.num_texts = 0  # events with text
        self.usage: dict[str, Any] = {}
        self._status = 0
        self._chunked = False
        self._missing: int | None = None  # bytes of the body, where the length is known
        self._received = b""  # not understood yet
        self._line = b""  # begin of a line of the body
        self._refusal = b""  # body of another status than 200

    def feed(self, data: bytes, now: float) -> bool:
        """Take received bytes; True when the response is complete.

        Raises:
            AnswerError: a status other than 200, or an error among the events.
        """
        self._received = self._received + data if self._received else data
        if not self._status and not self._read_head():
            return False
        if self._chunked:
            return self._read_chunks(now)
        body, self._received = self._received, b""
        self._read_body(body, now)
        if self._missing is None:
            return False
        self._missing -= len(body)
        return self._missing <= 0 and self._completed()

    def end(self) -> bool:
        """The connection ended: True when that is how this response says that it is complete."""
        return bool(self._status) and not self._chunked and self._missing is None and self._completed()

    def _read_head(self) -> bool:
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return False
        status_line, *lines = head.split(b"\r\n")
        self._status = int(status_line.split(b" ", 2)[1])
        fields = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(b":") for x in lines)
        }
        self._chunked = fields.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._missing = int(fields[b"content-length"]) if b"content-length" in fields else None
        self._received = body
        return True

    def _read_chunks(self, now: float) -> bool:
        received, position = self._received, 0
        while (size_end := received.find(b"\r\n", position)) >= 0:
            size = int(received[position:size_end].split(b";")[0], 16)
            end = size_end + 2 + size
            if len(received) < end + 2:
                break
            if size == 0:
                return self._completed()
            self._read_body(received[size_end + 2 : end], now)
            position = end + 2
        self._received = received[position:]
        return False

    def _read_body(self, data: bytes, now: float) -> None:
        if self._status != 200:
            self._refusal += data
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(DATA):
                self._read_event(line, now)

    def _read_event(self, line: bytes, now: float) -> None:
        at = line.find(CONTENT)
        if at >= 0:  # compact JSON: inside a string the quotes would be escaped
            if line[at + len(CONTENT)] != QUOTE:
                self._note_text(now)
            return
        if line.startswith(DONE):
            return
        event = json.loads(line[len(DATA) :])
        if "error" in event:
            raise AnswerError(str(event)[:SHOWN_CHARS])
        self.usage = event.get("usage") or self.usage
        delta = (event.get("choices") or [{}])[0].get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content"):
            self._note_text(now)

    def _note_text(self, now: float) -> None:
        self.last_text_at = now
        if self.first_text_at is None:
            self.first_text_at = now
        self.num_texts += 1

    def _completed(self) -> bool:
        if self._status != 200:
            text = self._refusal.decode(errors="replace")[:SHOWN_CHARS]
            raise AnswerError(f"{self._status} {text}")
        return True
