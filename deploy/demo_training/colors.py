"""What RGB values each colour word covers. The ranges are disjoint, so a colour has one name at most."""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class ColorRange:
    """A box of hue (degrees, may pass 360), saturation and value (0 to 1)."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]

    def choose(self, rng: random.Random) -> RGB:
        hue = rng.uniform(*self.hue) % 360 / 360
        red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(*self.saturation), rng.uniform(*self.value))
        return round(red * 255), round(green * 255), round(blue * 255)


COLOR_RANGES = {
    "red": ColorRange((352, 368), (0.78, 1.0), (0.72, 1.0)),
    "green": ColorRange((95, 146), (0.65, 1.0), (0.42, 0.9)),
    "blue": ColorRange((210, 242), (0.68, 1.0), (0.6, 1.0)),
    "yellow": ColorRange((50, 61), (0.75, 1.0), (0.92, 1.0)),
    "orange": ColorRange((22, 38), (0.85, 1.0), (0.95, 1.0)),
    "purple": ColorRange((270, 300), (0.55, 1.0), (0.45, 0.8)),
    "pink": ColorRange((322, 351), (0.24, 0.58), (0.96, 1.0)),
    "brown": ColorRange((16, 30), (0.6, 0.9), (0.28, 0.52)),
    "black": ColorRange((0, 360), (0.0, 0.2), (0.0, 0.1)),
    "white": ColorRange((0, 360), (0.0, 0.03), (0.96, 1.0)),
    "gray": ColorRange((0, 360), (0.0, 0.06), (0.42, 0.68)),
}


def choose_rgb(rng: random.Random, color: str) -> RGB:
    """An RGB value that anybody would call `color` (one of sample.COLORS)."""
    return COLOR_RANGES[color].choose(rng)


def distance(one: RGB, other: RGB) -> float:
    """How different two colours look, 0 to about 765 ("redmean" weighting of the RGB distance)."""
    mean_red = (one[0] + other[0]) / 2
    red, green, blue = (a - b for a, b in zip(one, other, strict=True))
    weighted = (2 + mean_red / 256) * red**2 + 4 * green**2 + (2 + (255 - mean_red) / 256) * blue**2
    return float(weighted**0.5)
