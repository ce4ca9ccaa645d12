"""The table counts exact matches by row and knows what falls short."""

from __future__ import annotations

import pytest

from deploy.demo_training.accuracy_table import REQUIREMENTS, AccuracyTable, Outcome
from deploy.demo_training.held_out import ROWS, Question

READING = "reading (up to 8 characters)"


def outcomes(row: str, right: int, wrong: int = 0) -> list[Outcome]:
    question = Question(row, ("What?",), "red")
    return [Outcome(question, "red", 0.5)] * right + [Outcome(question, "blue", 1.5)] * wrong


@pytest.mark.parametrize(
    ("got", "is_right"),
    [("OPEN", True), (" OPEN\n", True), ("open", False), ("OPEN.", False), ("OP EN", False), ("", False)],
)
def test_spaces_around_an_answer_are_forgiven_and_nothing_else(got: str, is_right: bool) -> None:
    assert Outcome(Question(READING, ("Read.",), "OPEN"), got, 0.1).is_right == is_right


def test_every_required_row_exists() -> None:
    assert {name for entry in REQUIREMENTS for name in entry.rows} <= {row.name for row in ROWS}


def test_what_is_required_stands_beside_its_row_and_four_rows_count_together() -> None:
    answered = [
        *outcomes(READING, 9, 1),
        *outcomes("color", 40),
        *outcomes("place", 7, 3),
        *outcomes("talk", 1),
    ]
    lines = AccuracyTable(answered).markdown().splitlines()
    assert lines[0] == "| row | n | right | exact match | asked |"
    for line in (
        f"| {READING} | 10 | 9 | 90.0 % | ≥ 90 % |",
        "| color | 40 | 40 | 100.0 % |  |",
        "| place | 10 | 7 | 70.0 % |  |",
        "| color, shape, count, place | 50 | 47 | 94.0 % | ≥ 95 % |",
        "| talk | 1 | 1 | 100.0 % |  |",
        "| all | 61 | 57 | 93.4 % |  |",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("row", "right", "wrong", "short"),
    [
        (READING, 18, 2, False),
        (READING, 17, 3, True),
        ("shape", 19, 1, False),
        ("shape", 18, 2, True),
        ("multi-image", 8, 2, True),
        ("motion", 8, 2, True),
        ("yes/no", 0, 20, False),
    ],
)
def test_a_required_row_below_its_percentage_falls_short(
    row: str, right: int, wrong: int, short: bool
) -> None:
    assert bool(AccuracyTable(outcomes(row, right, wrong)).falls_short) == short


def test_json_has_the_rows_and_what_was_wrong() -> None:
    told = AccuracyTable([*outcomes("motion", 3), *outcomes("count", 0, 1)]).as_json()
    assert {"row": "motion", "n": 3, "right": 3, "required_percent": 90} in told["rows"]
    assert told["wrong"] == [{"row": "count", "asked": ("What?",), "expected": "red", "got": "blue"}]
    assert told["median_seconds"] == 0.5
