"""Shop fronts: the sign is the largest text, and whatever is asked for can be seen."""

import random

import pytest

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.street import Street

SIZES = ((256, 256), (672, 448), (448, 672))


@pytest.mark.parametrize("size", SIZES)
def test_the_sign_is_written_first_and_above_all_other_texts(fonts: FontShelf, size: tuple[int, int]) -> None:
    rng = random.Random(3)
    for _ in range(40):
        street = Street(rng, size, fonts)
        sign = street.draw()[0].answer.replace(" ", "")
        marks = street.board.marks
        assert "".join(mark.label for mark in marks).startswith(sign)
        assert all(other.y > marks[0].y + 0.02 for other in marks[len(sign) :])
        assert all(0 < mark.x < 1 and 0 < mark.y < 1 for mark in marks)


def test_every_answer_is_written_and_no_price_board_covers_a_text(fonts: FontShelf) -> None:
    rng, prices = random.Random(4), 0
    for _ in range(120):
        street = Street(rng, (672, 448), fonts)
        turns = street.draw()
        written = "".join(mark.label for mark in street.board.marks)
        assert all(turn.answer.replace(" ", "") in written for turn in turns)
        prices += any(turn.task == "price" for turn in turns)
    assert prices > 10


def test_the_same_state_draws_the_same_street(fonts: FontShelf) -> None:
    one, other = (Street(random.Random(9), (300, 300), fonts) for _ in range(2))
    assert one.draw() == other.draw()
    assert one.board.image.tobytes() == other.board.image.tobytes()
