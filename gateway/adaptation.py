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


@dataclass(frozen=True)
class Adaptation:
    """How the paths of a chat request are called in the request that it was made from."""

    places: tuple[str, ...]  # of the content of each message
    names: Mapping[str, str]  # path, or the end of one behind its dot -> what it is called
    messages: str  # all messages

    def param(self, path: str) -> str:
        if path == "messages":
            return self.messages
        match = _MESSAGE.fullmatch(path)
        if match is None or int(match[1]) >= len(self.places):
            return self.names.get(path, path)
        rest = match[2]
        for end, name in self.names.items():
            if rest.endswith(f".{end}"):
                rest = rest.removesuffix(end) + name
                break
        return self.places[int(match[1])] + rest

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
