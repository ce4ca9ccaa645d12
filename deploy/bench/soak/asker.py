"""Chat requests of one server, sent and checked against what they ask for and what a quiet server said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from deploy.bench.soak.bad_input import BadInput
from deploy.bench.soak.connection import Head, HttpConnection, request_bytes
from deploy.bench.soak.event_stream import EventStream
from deploy.bench.soak.pictures import Pictures
from deploy.bench.soak.unexpected import Unexpected

MAX_TOKENS = 32
SHOWN_BYTES = 500
ERROR_KEYS = {"message", "type", "param", "code"}

Message = dict[str, Any]


class Asker:
    """What all clients of a run share; holds no connection."""

    def __init__(
        self, host: str, port: int, model: str, pictures: Pictures, questions: Sequence[str]
    ) -> None:
        """`questions` follow one another in a conversation about the known picture."""
        self.host = host
        self.port = port
        self.pictures = pictures
        self.model = model
        self._questions = questions
        self._answers: list[str] = []  # of a quiet server

    @asynccontextmanager
    async def connection(self, receive_bytes: int = 0) -> AsyncIterator[HttpConnection]:
        """Closed in good order behind a success, reset behind anything else."""
        connection = await HttpConnection.open(self.host, self.port, receive_bytes)
        try:
            yield connection
            await connection.close()
        finally:
            connection.abort()

    def body(self, messages: Sequence[Message], **fields: Any) -> bytes:
        return json.dumps({"model": self.model, "messages": messages, **fields}).encode()

    async def ask(self, connection: HttpConnection, messages: Sequence[Message], **fields: Any) -> list[str]:
        """The texts of the choices of a whole answer.  Raises Unexpected."""
        body = self.body(messages, **{"max_tokens": MAX_TOKENS, **fields})
        await connection.send(request_bytes(body))
        return texts_of(*await self.read(connection), fields.get("n", 1))

    async def stream(
        self, connection: HttpConnection, messages: Sequence[Message], **fields: Any
    ) -> AsyncIterator[dict[int, str]]:
        """The texts of the choices so far, behind each piece.  Raises Unexpected."""
        fields = {
            "max_tokens": MAX_TOKENS,
            **fields,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await connection.send(request_bytes(self.body(messages, **fields)))
        head = await connection.read_head()
        if head.status != 200:
            raise Unexpected(_shown(head, await connection.read_body(head)))
        events = EventStream()
        async for piece in connection.pieces(head):
            events.feed(piece)
            yield events.texts
        events.check_end(fields.get("n", 1))

    async def read(self, connection: HttpConnection) -> tuple[Head, bytes]:
        head = await connection.read_head()
        return head, await connection.read_body(head)

    async def learn(self) -> None:
        """Hold the conversation about the known picture while nobody else asks."""
        for turn in range(len(self._questions)):
            async with self.connection() as connection:
                self._answers += await self.ask(connection, self.conversation(turn), temperature=0)

    @property
    def num_turns(self) -> int:
        return len(self._questions)

    def conversation(self, turn: int) -> list[Message]:
        """Up to the question of that number, with the answers before it."""
        first = {"type": "text", "text": self._questions[0]}
        messages: list[Message] = [{"role": "user", "content": [self.pictures.known, first]}]
        for answer, question in zip(self._answers[:turn], self._questions[1 : turn + 1], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return messages

    def check_answer(self, turn: int, text: str) -> None:
        """Raises Unexpected: not what the quiet server said."""
        if text != self._answers[turn]:
            raise Unexpected(f"turn {turn} was answered {text!r}, on a quiet server {self._answers[turn]!r}")

    async def send_bad(self, bad: BadInput) -> None:
        """Raises Unexpected: it was not refused as it should be."""
        async with self.connection() as connection:
            await connection.send(bad.request)
            head, body = await self.read(connection)
        error = _json(head, body).get("error")
        if head.status != bad.status or not isinstance(error, dict) or not ERROR_KEYS <= set(error):
            raise Unexpected(f"{bad.name}: {bad.status} expected, got {_shown(head, body)}")
        if bad.code and error["code"] != bad.code:
            raise Unexpected(f"{bad.name}: code {bad.code} expected, got {_shown(head, body)}")


def texts_of(head: Head, body: bytes, num_choices: int) -> list[str]:
    """Of a whole answer.  Raises Unexpected."""
    if head.status != 200:
        raise Unexpected(_shown(head, body))
    choices = _json(head, body)["choices"]
    if len(choices) != num_choices or not all(choice["finish_reason"] for choice in choices):
        raise Unexpected(f"{num_choices} ended choices expected, got {_shown(head, body)}")
    return [choice["message"]["content"] for choice in choices]


def _json(head: Head, body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise Unexpected(f"no JSON: {_shown(head, body)}") from None


def _shown(head: Head, body: bytes) -> str:
    return f"{head.status} {body[:SHOWN_BYTES].decode(errors='replace')}"
