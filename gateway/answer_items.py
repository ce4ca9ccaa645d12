"""What one choice has said, as items in order: what it thought, its texts, its tool calls.

Knows no endpoint's way to show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from gateway.errors import AnswerBrokeOff
from gateway.events import Delta, Event, Finished, Restarted, TokenLogprob, Usage
from gateway.tool_calls import ToolCall, ToolCalls

Kind = Literal["reasoning", "text", "call"]


@dataclass(eq=False)
class Item:
    index: int  # in the answer
    kind: Kind
    text: str = ""  # of reasoning or a text
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of a text
    call: ToolCall | None = None  # of a call


@dataclass(frozen=True, slots=True)
class Opened:
    item: Item


@dataclass(frozen=True, slots=True)
class Grew:
    item: Item
    piece: str  # text, or more of a call's arguments
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    item: Item


Step = Opened | Grew | Closed


class AnswerItems:
    """Gathers deltas; an item is closed when the next one begins or the answer ends.

    White space is a text only beside other text: what models write around reasoning and calls says nothing.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._calls = ToolCalls()
        self._is_open = False
        self._held = ""  # white space that may begin a text
        self._held_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, delta: Delta) -> list[Step]:
        """What has changed by it.  Raises ModelError for calls out of order."""
        steps: list[Step] = []
        if delta.reasoning:
            steps += self._say("reasoning", delta.reasoning)
        # Log-probabilities are those of texts.
        logprobs = () if delta.reasoning or delta.calls else delta.logprobs
        if delta.text or logprobs:
            steps += self._add_text(delta.text, logprobs)
        for piece in delta.calls:
            if piece.name:
                steps += self._close()
                self._hold("", ())
            call = self._calls.add(piece)
            if piece.name:
                steps.append(self._open("call", call))
            if piece.arguments:
                steps.append(Grew(self.items[-1], piece.arguments))
        return steps

    def finish(self) -> list[Step]:
        """The answer has ended: without calls it has a text, if an empty one."""
        steps: list[Step] = []
        if all(item.kind == "reasoning" for item in self.items):
            steps += self._say("text", self._held, self._held_logprobs)
        return [*steps, *self._close()]

    def _add_text(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Iterator[Step]:
        begun = self._is_open and self.items[-1].kind == "text"
        if not begun:
            text, logprobs = self._held + text, (*self._held_logprobs, *logprobs)
        if begun or text.strip():
            self._hold("", ())
            yield from self._say("text", text, logprobs)
        else:
            self._hold(text, logprobs)

    def _hold(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        self._held, self._held_logprobs = text, logprobs

    def _say(self, kind: Kind, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> Iterator[Step]:
        if not self._is_open or self.items[-1].kind != kind:
            yield from self._close()
            yield self._open(kind)
        item = self.items[-1]
        item.text += text
        item.logprobs.extend(logprobs)
        if text or logprobs:
            yield Grew(item, text, logprobs)

    def _open(self, kind: Kind, call: ToolCall | None = None) -> Opened:
        self.items.append(Item(len(self.items), kind, call=call))
        self._is_open = True
        return Opened(self.items[-1])

    def _close(self) -> Iterator[Step]:
        if self._is_open:
            self._is_open = False
            yield Closed(self.items[-1])


class AnswerSoFar:
    """An answer of one choice: its items, how it ended, what it cost.  Begins anew when the answer does."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._items = AnswerItems()
        self._finished: Finished | None = None
        self._usage: Usage | None = None

    def add(self, event: Event) -> list[Step]:
        """What has changed of the items."""
        if isinstance(event, Delta):
            return self._items.add(event)
        if isinstance(event, Finished):
            self._finished = event
            return self._items.finish()
        if isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Restarted):
            self._begin()
        return []

    @property
    def items(self) -> list[Item]:
        return self._items.items

    @property
    def is_cut(self) -> bool:
        """It has ended where no more tokens were allowed."""
        return self._finished is not None and self._finished.reason == "length"

    def end(self) -> tuple[Finished, Usage]:
        """Raises AnswerBrokeOff."""
        if self._finished is None or self._usage is None:
            raise AnswerBrokeOff
        return self._finished, self._usage
