"""Whether a series grows: Theil-Sen's slope with Sen's bounds, which outliers and steps hardly move."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

Z = 1.645  # one side, 95 %
MIN_POINTS = 5


@dataclass(frozen=True)
class Trend:
    """Change in a unit of time: the median of all pairs, and with 95 % confidence at least `least`."""

    slope: float
    least: float


def spread(values: Sequence[float]) -> float:
    """Between the first and the last decile."""
    if len(values) < 2:
        return 0.0
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[-1] - deciles[0]


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Sen 1968, "Estimates of the regression coefficient based on Kendall's tau".

    Of fewer than MIN_POINTS nothing can be said: `least` is then minus infinity.
    """
    slopes = sorted(
        (values[late] - values[early]) / (times[late] - times[early])
        for early, late in combinations(range(len(times)), 2)
    )
    if not slopes:
        return Trend(0.0, -math.inf)
    count = len(times)
    deviation = Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    rank = int((len(slopes) - deviation) / 2)
    least = slopes[rank] if count >= MIN_POINTS and rank >= 0 else -math.inf
    return Trend(statistics.median(slopes), least)
