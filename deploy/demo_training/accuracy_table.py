"""What a model answered, counted by the rows of the accuracy table and held against what is required of it.

An answer is right when it is the expected text, spaces around it aside; knows nothing of servers or pictures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.demo_training.held_out import ROWS, Question


@dataclass(frozen=True)
class Requirement:
    """At least `percent` of the questions of these rows together."""

    rows: tuple[str, ...]
    percent: int

    @property
    def name(self) -> str:
        return ", ".join(self.rows)


REQUIREMENTS = (
    Requirement(("reading (up to 8 characters)",), 90),
    Requirement(("color", "shape", "count", "place"), 95),
    Requirement(("multi-image",), 90),
    Requirement(("motion",), 90),
)


@dataclass(frozen=True)
class Outcome:
    """One question and what came back."""

    question: Question
    got: str
    seconds: float  # from sending the (last) request to the end of its answer

    @property
    def is_right(self) -> bool:
        return self.got.strip() == self.question.answer.strip()


@dataclass(frozen=True)
class Score:
    """A line of the table; `required` is the least percentage, None where nothing is required."""

    name: str
    number: int
    right: int
    required: int | None = None

    @property
    def percent(self) -> float:
        return 100 * self.right / self.number if self.number else 0.0

    @property
    def falls_short(self) -> bool:
        return self.required is not None and 100 * self.right < self.required * self.number


class AccuracyTable:
    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = outcomes

    @property
    def scores(self) -> list[Score]:
        """Every row, with what is required of several rows together behind the last of them; then all."""
        scores = []
        for row in ROWS:
            requirement = next((entry for entry in REQUIREMENTS if row.name == entry.rows[-1]), None)
            if requirement is None or len(requirement.rows) > 1:
                scores.append(self._score(row.name, (row.name,)))
            if requirement is not None:
                scores.append(self._score(requirement.name, requirement.rows, requirement.percent))
        return [*scores, self._score("all", tuple(row.name for row in ROWS))]

    @property
    def wrong(self) -> list[Outcome]:
        return [outcome for outcome in self._outcomes if not outcome.is_right]

    @property
    def falls_short(self) -> list[Score]:
        return [score for score in self.scores if score.falls_short]

    @property
    def median_seconds(self) -> float:
        return statistics.median(outcome.seconds for outcome in self._outcomes)

    def markdown(self) -> str:
        return "\n".join(
            ["| row | n | right | exact match | asked |", "|---|--:|--:|--:|--:|", *self._lines()]
        )

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"row": score.name, "n": score.number, "right": score.right, "required_percent": score.required}
            for score in self.scores
        ]
        wrong = [
            {
                "row": outcome.question.row,
                "asked": outcome.question.texts,
                "expected": outcome.question.answer,
                "got": outcome.got,
            }
            for outcome in self.wrong
        ]
        return {"median_seconds": self.median_seconds, "rows": rows, "wrong": wrong}

    def _lines(self) -> Iterator[str]:
        for score in self.scores:
            asked = f"≥ {score.required} %" if score.required else ""
            yield f"| {score.name} | {score.number} | {score.right} | {score.percent:.1f} % | {asked} |"

    def _score(self, name: str, rows: tuple[str, ...], required: int | None = None) -> Score:
        found = [outcome for outcome in self._outcomes if outcome.question.row in rows]
        return Score(name, len(found), sum(outcome.is_right for outcome in found), required)
