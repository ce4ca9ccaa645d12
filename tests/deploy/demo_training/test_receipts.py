"""Receipts: sums are right, everything asked for is printed, and it fits."""

import random
from decimal import Decimal

import pytest

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.receipts import Receipt, make_receipt

SIZES = ((256, 256), (224, 320), (448, 672), (672, 448), (160, 320), (700, 230))


def test_the_total_is_the_sum_of_goods_and_tax() -> None:
    receipt = Receipt("DELI", (("Tea", 240), ("Cake", 1005)), ("Tax", 61), "Total", "$")
    assert receipt.total == 1306
    assert [receipt.printed(amount) for _, amount in receipt.rows] == ["$2.40", "$10.05", "$0.61", "$13.06"]
    assert Receipt("DELI", (("Tea", 240),), None, "Sum", "").rows[-1] == ("Sum", 240)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_everything_asked_for_is_printed_inside_the_picture(
    fonts: FontShelf, size: tuple[int, int], level: float
) -> None:
    rng = random.Random(1)
    for _ in range(25):
        sample = make_receipt(rng, size, fonts, level)
        (picture,) = sample.pictures
        assert picture.image.size == size and 1 <= len(sample.turns) <= 3
        assert all(0 < mark.x < 1 and 0 < mark.y < 1 for mark in picture.marks)
        written = "".join(mark.label for mark in picture.marks)
        for turn in sample.turns:
            assert turn.task in ("total", "price", "read")
            assert turn.answer.replace(" ", "") in written, turn


def test_the_printed_total_is_the_last_amount_and_none_is_larger(fonts: FontShelf) -> None:
    rng, totals = random.Random(2), 0
    for _ in range(120):
        sample = make_receipt(rng, (448, 672), fonts, 1.0)
        answers = {turn.task: turn.answer for turn in sample.turns}
        if "total" in answers:
            written = "".join(mark.label for mark in sample.pictures[0].marks)
            assert written.endswith(answers["total"])
            prices = [turn.answer for turn in sample.turns if turn.task == "price"]
            assert sum(map(amount, prices), Decimal()) <= amount(answers["total"])
            totals += 1
    assert totals > 20


def test_the_same_state_gives_the_same_bytes(fonts: FontShelf) -> None:
    for seed in range(15):
        one, other = (make_receipt(random.Random(seed), (300, 400), fonts, 1.0) for _ in range(2))
        assert one.pictures[0].image.tobytes() == other.pictures[0].image.tobytes()
        assert one.turns == other.turns and one.pictures[0].marks == other.pictures[0].marks


def test_no_question_is_asked_twice(fonts: FontShelf) -> None:
    rng = random.Random(4)
    for _ in range(100):
        questions = [turn.question for turn in make_receipt(rng, (256, 300), fonts, 1.0).turns]
        assert len(set(questions)) == len(questions)


def amount(printed: str) -> Decimal:
    return Decimal(printed.removeprefix("$"))
