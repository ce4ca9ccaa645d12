"""Another API's request as a chat request, and from the paths of the one back to those of the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from gateway.events import Batches
from gateway.parsing import check_together, fault_of
from gateway.schema import ChatCompletionRequest
from protos.errors import ServingError

_MESSAGE = re.compile(r"messages\.(\d+)(?:\.content)?(.*)")
_PART = re.compile(r"\.(\d+)(.*)")
_CALL = re.compile(r"\.tool_calls\.(\d+)(.*)")
# Levels that chats have around tools, and other APIs have not.
_NESTED = re.compile(r"\.(?:function|allowed_tools)(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """Where a chat message was in the original request."""

    content: str
    parts: tuple[str, ...] | None = None  # of each content part; None: at its own place below `content`
    calls: tuple[str, ...] = ()  # of each tool call


@dataclass(frozen=True)
class Adaptation:
    """How the paths of a chat request are called in the request that it was made from."""

    places: tuple[Place, ...]  # of each message
    names: Mapping[str, str]  # path, its beginning before a dot, or its end behind one -> what that is called
    messages: str  # all messages

    def param(self, path: str) -> str:
        if path == "messages":
            return self.messages
        match = _MESSAGE.fullmatch(path)
        if match is None or int(match[1]) >= len(self.places):
            return self._renamed(_NESTED.sub("", path))
        place, rest = self.places[int(match[1])], match[2]
        if (call := _CALL.fullmatch(rest)) and int(call[1]) < len(place.calls):
            return place.calls[int(call[1])] + self._renamed(_NESTED.sub("", call[2]))
        part = _PART.fullmatch(rest)
        if part is None or place.parts is None or int(part[1]) >= len(place.parts):
            return place.content + self._renamed(rest)
        return place.parts[int(part[1])] + self._renamed(part[2])

    def _renamed(self, path: str) -> str:
        for old, new in self.names.items():
            if path == old or path.startswith(f"{old}."):
                return new + path.removeprefix(old)
            if path.endswith(f".{old}"):
                return path.removesuffix(old) + new
        return path

    def chat(self, body: Mapping[str, Any]) -> ChatCompletionRequest:
        """Raises RequestError in the words of the request that `body` was made from."""
        with self.reworded():
            try:
                chat = ChatCompletionRequest.model_validate(body)
            except ValidationError as error:
                raise fault_of(error) from None
            check_together(chat)
            return chat

    @contextmanager
    def reworded(self) -> Iterator[None]:
        """Errors from inside name the fields of the original request."""
        try:
            yield
        except ServingError as error:
            if error.field:
                field = self.param(error.field)
                error.message = error.message.replace(f"'{error.field}'", f"'{field}'")
                error.field = field
            raise

    async def events(self, batches: Batches) -> Batches:
        """The same events; errors reworded."""
        with self.reworded():
            async with aclosing(batches) as source:
                async for batch in source:
                    yield batch


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that the request left out."""
    return {name: value for name, value in fields.items() if value is not None}


def same_fields(request: Any, names: Sequence[str]) -> dict[str, Any]:
    """Fields that both requests call the same."""
    return given({name: getattr(request, name) for name in names})
