"""Colour words cover disjoint, believable ranges."""

from __future__ import annotations

import colorsys
import itertools
import random

import pytest

from deploy.demo_training.colors import COLOR_RANGES, ColorRange, choose_rgb, distance
from deploy.demo_training.sample import COLORS


def _contains(box: ColorRange, rgb: tuple[int, int, int]) -> bool:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    degrees = hue * 360
    in_hue = any(box.hue[0] - 3 <= turn <= box.hue[1] + 3 for turn in (degrees, degrees + 360))
    grayish = box.saturation[0] == 0.0
    in_saturation = box.saturation[0] - 0.02 <= saturation <= box.saturation[1] + 0.02
    # Next to black the saturation of 8-bit values means nothing.
    dark = box.value[1] <= 0.1 and value <= 0.11
    return (
        (in_hue or grayish)
        and (in_saturation or dark)
        and box.value[0] - 0.01 <= value <= box.value[1] + 0.01
    )


def test_every_color_word_has_a_range() -> None:
    assert set(COLOR_RANGES) == set(COLORS)


def test_a_chosen_value_is_in_the_range_of_its_word_and_of_no_other() -> None:
    rng = random.Random(1)
    for color in COLORS:
        for _ in range(300):
            rgb = choose_rgb(rng, color)
            assert [word for word in COLORS if _contains(COLOR_RANGES[word], rgb)] == [color], (color, rgb)


@pytest.mark.parametrize(
    ("color", "rgb"),
    [
        ("red", (255, 0, 0)),
        ("green", (0, 128, 0)),
        ("blue", (0, 0, 255)),
        ("yellow", (255, 255, 0)),
        ("orange", (255, 140, 0)),
        ("purple", (128, 0, 128)),
        ("pink", (255, 192, 203)),
        ("brown", (120, 66, 18)),
        ("black", (0, 0, 0)),
        ("white", (255, 255, 255)),
        ("gray", (128, 128, 128)),
    ],
)
def test_what_everybody_calls_by_a_word_is_in_its_range(color: str, rgb: tuple[int, int, int]) -> None:
    assert _contains(COLOR_RANGES[color], rgb)


def test_different_words_look_different() -> None:
    rng = random.Random(2)
    for one, other in itertools.combinations(COLORS, 2):
        closest = min(distance(choose_rgb(rng, one), choose_rgb(rng, other)) for _ in range(100))
        assert closest > 45, (one, other, closest)


def test_distance_is_symmetric_and_zero_for_the_same() -> None:
    assert distance((10, 20, 30), (10, 20, 30)) == 0
    assert distance((10, 20, 30), (200, 0, 5)) == distance((200, 0, 5), (10, 20, 30))
    assert distance((0, 0, 0), (255, 255, 255)) > 700
