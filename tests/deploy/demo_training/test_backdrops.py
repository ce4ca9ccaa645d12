"""A backdrop stays between its shades and rules out the colours it could be taken for."""

from __future__ import annotations

import random

import pytest

from deploy.demo_training.backdrops import make_backdrop
from deploy.demo_training.colors import choose_rgb, distance


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_every_pixel_lies_between_the_two_shades(level: float) -> None:
    for seed in range(80):
        backdrop = make_backdrop(random.Random(seed), (90, 60), level)
        assert backdrop.image.size == (90, 60) and backdrop.image.mode == "RGB"
        extrema = backdrop.image.getextrema()
        for (low, high), first, second in zip(extrema, *backdrop.shades, strict=True):
            assert min(first, second) <= low and high <= max(first, second)


def test_no_color_that_may_stand_on_it_looks_like_it() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        backdrop = make_backdrop(rng, (20, 20), 1.0)
        for color in backdrop.colors:
            assert min(distance(choose_rgb(rng, color), shade) for shade in backdrop.shades) > 20, color


def test_the_same_state_gives_the_same_bytes() -> None:
    one, other = (make_backdrop(random.Random(7), (64, 48), 1.0) for _ in range(2))
    assert one.image.tobytes() == other.image.tobytes() and one.shades == other.shades


def test_some_backdrops_are_graded_and_some_are_plain() -> None:
    pictures = [make_backdrop(random.Random(seed), (40, 40), 1.0).image for seed in range(60)]
    plain = sum(all(low == high for low, high in picture.getextrema()) for picture in pictures)
    assert 10 < plain < 50
