"""Draws one shape, slightly turned and with smooth edges; knows outlines, not what is asked about them."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from deploy.demo_training.colors import RGB, distance

SMOOTHING = 3  # the mask is drawn this much larger, then averaged
MASK_REACH = 1.25  # the farthest outline point in units of the radius, with room to spare
CLEAR_DISTANCE = 180.0  # colours closer than this need an outline between them


def _regular(corners: int, radius: float, first: float = -90.0) -> tuple[tuple[float, float], ...]:
    angles = [math.radians(first + 360 * corner / corners) for corner in range(corners)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _star() -> tuple[tuple[float, float], ...]:
    outer, inner = _regular(5, 1.1), _regular(5, 0.46, -54.0)
    return tuple(point for pair in zip(outer, inner, strict=True) for point in pair)


def _cross() -> tuple[tuple[float, float], ...]:
    arm = 0.33
    quarter = ((-arm, -1.0), (arm, -1.0), (arm, -arm))
    turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
    return tuple((a * x + b * y, c * x + d * y) for a, b, c, d in turns for x, y in quarter)


def _heart() -> tuple[tuple[float, float], ...]:
    steps = [2 * math.pi * step / 28 for step in range(28)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in steps
    )


OUTLINES = {
    "square": ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": _regular(3, 1.12),
    "star": _star(),
    "diamond": ((0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)),
    "cross": _cross(),
    "heart": _heart(),
    "hexagon": _regular(6, 1.0),
}
# Degrees either way that leave a shape what it is (a square turned by 45 degrees is a diamond).
LARGEST_TURN = {
    "square": 12,
    "triangle": 14,
    "star": 18,
    "diamond": 8,
    "cross": 12,
    "heart": 14,
    "hexagon": 15,
}


def draw_shape(
    image: Image.Image, shape: str, center: tuple[float, float], diameter: float, turn: float, fill: RGB
) -> None:
    """Paints `shape` (one of sample.SHAPES), turned by `turn` degrees, onto `image` in place."""
    mask = _mask(shape, diameter / 2, turn)
    image.paste(fill, (round(center[0] - mask.width / 2), round(center[1] - mask.height / 2)), mask)


def choose_turn(rng: random.Random, shape: str) -> float:
    return rng.uniform(-1, 1) * LARGEST_TURN.get(shape, 0)


def outline_for(fill: RGB, behind: tuple[RGB, RGB]) -> RGB | None:
    """Black or white around a shape whose colour is close to what is behind it; None where it stands out."""
    if min(distance(fill, shade) for shade in behind) >= CLEAR_DISTANCE:
        return None
    return max(((20, 20, 20), (245, 245, 245)), key=lambda line: distance(fill, line))


def _mask(shape: str, radius: float, turn: float) -> Image.Image:
    reach = math.ceil(radius * MASK_REACH)
    mask = Image.new("L", (2 * reach * SMOOTHING, 2 * reach * SMOOTHING))
    middle, scale = reach * SMOOTHING, radius * SMOOTHING
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((middle - scale, middle - scale, middle + scale, middle + scale), 255)
        return mask.reduce(SMOOTHING)
    sine, cosine = math.sin(math.radians(turn)) * scale, math.cos(math.radians(turn)) * scale
    points = [(middle + x * cosine - y * sine, middle + x * sine + y * cosine) for x, y in OUTLINES[shape]]
    draw.polygon(points, 255)
    return mask.reduce(SMOOTHING)
