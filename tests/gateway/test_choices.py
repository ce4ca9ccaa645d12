from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gateway.choices import Choices
from gateway.errors import AnswerBrokeOff
from gateway.events import Delta, Event, Finished, Restarted, Usage


@dataclass
class Texts:
    texts: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)


def gathered(num_choices: int, *events: Event) -> Choices[Texts]:
    choices = Choices(num_choices, Texts)
    for event in events:
        choices.add(event)
    return choices


def test_each_choice_gets_its_own() -> None:
    events = (
        Delta(1, "b", 1),
        Delta(0, "a", 1),
        Delta(1, "c", 1),
        Finished(1, "stop"),
        Finished(0, "length"),
    )
    assert gathered(2, *events, Usage(3, 4)).finished() == (
        [Texts(["a"], "length"), Texts(["b", "c"], "stop")],
        Usage(3, 4),
    )


def test_an_answer_begun_anew_keeps_nothing() -> None:
    first = (Delta(0, "x", 1), Finished(0, "stop"), Usage(3, 1))
    choices = gathered(1, *first, Restarted(), Delta(0, "y", 1), Finished(0, "stop"))
    with pytest.raises(AnswerBrokeOff):
        choices.finished()
    choices.add(Usage(3, 2))
    assert choices.finished() == ([Texts(["y"], "stop")], Usage(3, 2))


@pytest.mark.parametrize(
    "events", [(Finished(0, "stop"), Usage(1, 1)), (Finished(0, "stop"), Finished(1, "stop"))]
)
def test_what_is_missing_at_the_end_broke_off(events: tuple[Event, ...]) -> None:
    with pytest.raises(AnswerBrokeOff):
        gathered(2, *events).finished()
