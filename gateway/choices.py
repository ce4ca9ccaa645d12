"""The choices of one answer, gathered from its events.  Knows no endpoint's way to show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from gateway.errors import AnswerBrokeOff
from gateway.events import Delta, Event, Finished, Restarted, Usage


class Choice(Protocol):
    finish_reason: str | None  # None: not finished yet

    def add(self, delta: Delta) -> None: ...


ChoiceT = TypeVar("ChoiceT", bound=Choice)


class Choices(Generic[ChoiceT]):
    """As many as the request asked for; an answer that is begun anew begins with empty ones."""

    def __init__(self, num_choices: int, make: Callable[[], ChoiceT]) -> None:
        self._num_choices = num_choices
        self._make = make
        self._begin()

    def _begin(self) -> None:
        self._choices = [self._make() for _ in range(self._num_choices)]
        self._usage: Usage | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._choices[event.index].add(event)
        elif isinstance(event, Finished):
            self._choices[event.index].finish_reason = event.reason
        elif isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Restarted):
            self._begin()

    def finished(self) -> tuple[list[ChoiceT], Usage]:
        """All of them, and what they cost.  Raises AnswerBrokeOff."""
        if self._usage is None or any(choice.finish_reason is None for choice in self._choices):
            raise AnswerBrokeOff
        return self._choices, self._usage
