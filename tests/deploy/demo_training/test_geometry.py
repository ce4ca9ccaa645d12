"""Places and neighbours are told only where people would agree."""

from __future__ import annotations

import pytest

from deploy.demo_training.geometry import beside, is_beside, ninth, reading_groups
from deploy.demo_training.scenes import Scene, Thing

SIZE = (300, 300)


def _thing(x: float, y: float, name: str = "red circle", diameter: float = 40) -> Thing:
    color, shape = name.split()
    return Thing(color, shape, x, y, diameter)


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (50, 50, "top left"),
        (150, 50, "top"),
        (250, 50, "top right"),
        (50, 150, "left"),
        (150, 150, "center"),
        (250, 150, "right"),
        (50, 250, "bottom left"),
        (150, 250, "bottom"),
        (250, 250, "bottom right"),
        (100, 150, None),
        (150, 205, None),
    ],
)
def test_a_ninth_is_named_only_well_inside_it(x: float, y: float, place: str | None) -> None:
    assert ninth(SIZE, _thing(x, y)) == place


def test_in_a_row_the_next_object_is_the_neighbour() -> None:
    row = [_thing(50 + 60 * index, 150 + index) for index in range(4)]
    scene = Scene(SIZE, tuple(row))
    assert beside(scene, row[2], "left") is row[1]
    assert beside(scene, row[2], "right") is row[3]
    assert beside(scene, row[0], "left") is None
    assert beside(scene, row[2], "above") is None


def test_two_objects_at_about_the_same_distance_leave_no_single_neighbour() -> None:
    middle, upper, lower = _thing(250, 150), _thing(100, 120), _thing(100, 185)
    assert beside(Scene(SIZE, (middle, upper, lower)), middle, "left") is None
    assert beside(Scene(SIZE, (middle, upper)), middle, "left") is upper


def test_a_diagonal_object_is_no_neighbour_but_is_on_that_side() -> None:
    one, other = _thing(60, 60), _thing(240, 240)
    assert beside(Scene(SIZE, (one, other)), one, "right") is None
    assert is_beside(SIZE, other, "right", one) and is_beside(SIZE, other, "below", one)
    assert not is_beside(SIZE, one, "right", other)


def test_objects_one_above_the_other_are_neither_left_nor_right() -> None:
    one, other = _thing(150, 60), _thing(160, 240)
    assert not is_beside(SIZE, other, "right", one) and not is_beside(SIZE, other, "left", one)


def test_groups_come_in_reading_order() -> None:
    things = (
        _thing(250, 60, "blue star"),
        _thing(60, 240, "blue star"),
        _thing(50, 70, "red circle"),
        _thing(240, 250, "pink heart"),
    )
    groups = reading_groups(Scene(SIZE, things))
    assert groups is not None
    assert [(group[0].name, len(group)) for group in groups] == [
        ("red circle", 1),
        ("blue star", 2),
        ("pink heart", 1),
    ]


def test_there_is_no_reading_order_between_half_a_row() -> None:
    assert reading_groups(Scene(SIZE, (_thing(50, 100), _thing(250, 135)))) is None
