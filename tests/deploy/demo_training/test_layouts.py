"""Spots keep clear of each other and of the border."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from deploy.demo_training.layouts import lay_out, smallest_diameter

SIZES = [(256, 256), (672, 448), (700, 206), (206, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("level", "most"), [(0.0, 2), (0.5, 5), (1.0, 8)])
def test_spots_never_touch_each_other_or_the_border(size: tuple[int, int], level: float, most: int) -> None:
    for seed in range(150):
        spots = lay_out(random.Random(seed), size, level, most)
        assert 1 <= len(spots) <= most
        for index, spot in enumerate(spots):
            assert spot.diameter * 0.55 <= min(spot.x, spot.y, size[0] - spot.x, size[1] - spot.y)
            for other in spots[:index]:
                gap = math.hypot(spot.x - other.x, spot.y - other.y) - (spot.diameter + other.diameter) / 2
                assert gap > 0.1 * min(spot.diameter, other.diameter)


def test_every_number_of_objects_comes_up() -> None:
    counts = Counter(len(lay_out(random.Random(seed), (256, 256), 1.0, 8)) for seed in range(1600))
    assert set(counts) == set(range(1, 9))
    assert min(counts.values()) > 120


def test_easy_objects_are_large_and_hard_ones_are_still_twenty_pixels_on_the_thumbnail() -> None:
    easy = [spot for seed in range(100) for spot in lay_out(random.Random(seed), (224, 224), 0.0, 2)]
    assert min(spot.diameter for spot in easy) > 50
    hard = [spot for seed in range(400) for spot in lay_out(random.Random(seed), (224, 224), 1.0, 8)]
    assert 19 < min(spot.diameter for spot in hard) < 30
    assert smallest_diameter((672, 448), 1.0) * 224 / 672 > 19
