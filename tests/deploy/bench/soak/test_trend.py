from __future__ import annotations

import math
import random

from deploy.bench.soak.trend import spread, trend

TIMES = [float(second) for second in range(0, 300, 10)]


def test_a_straight_line_has_its_slope() -> None:
    found = trend(TIMES, [7 + 3 * second for second in TIMES])
    assert found.slope == found.least == 3


def test_noise_around_a_level_is_no_growth() -> None:
    rng = random.Random(1)
    found = trend(TIMES, [rng.gauss(1000, 50) for _ in TIMES])
    assert found.least < 0


def test_growth_is_found_below_noise() -> None:
    rng = random.Random(2)
    found = trend(TIMES, [2 * second + rng.gauss(1000, 50) for second in TIMES])
    assert 0 < found.least < 2
    assert abs(found.slope - 2) < 0.5


def test_outliers_do_not_move_it() -> None:
    values = [5.0] * len(TIMES)
    values[3], values[-1] = 1e9, 1e9
    assert trend(TIMES, values).slope == 0
    assert trend(TIMES, values).least <= 0


def test_of_few_points_nothing_is_said() -> None:
    assert trend([0, 1, 2], [0, 10, 20]).least == -math.inf
    assert trend([0], [1]).least == -math.inf


def test_the_spread_leaves_the_ends_out() -> None:
    assert spread([*range(11)]) == 8
    assert spread([1000, *range(1, 10), -1000]) == 8
    assert spread([5]) == 0
