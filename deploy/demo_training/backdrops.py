"""Surfaces that objects stand on, plain, graded or softly textured; knows which colours they rule out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from deploy.demo_training.canvas import patches
from deploy.demo_training.colors import COLOR_RANGES, RGB, ColorRange
from deploy.demo_training.sample import COLORS

# Surfaces without a colour of their own, each with the words that an object on it must not have.
SURFACES: tuple[tuple[ColorRange, tuple[str, ...]], ...] = (
    (ColorRange((0, 360), (0.0, 0.02), (0.96, 1.0)), ("white",)),
    (ColorRange((0, 360), (0.03, 0.14), (0.80, 0.9)), ()),
    (ColorRange((0, 360), (0.0, 0.2), (0.0, 0.09)), ("black",)),
    (ColorRange((0, 360), (0.1, 0.25), (0.15, 0.24)), ()),
)
SURFACE_WEIGHTS = (3, 4, 1, 2)


@dataclass(frozen=True)
class Backdrop:
    image: Image.Image  # RGB
    shades: tuple[RGB, RGB]  # all its pixels lie between these two
    colors: tuple[str, ...]  # colour words of objects that may stand on it


def make_backdrop(rng: random.Random, size: tuple[int, int], level: float) -> Backdrop:
    """A surface; coloured, graded and textured ones come with the level (0 to 1)."""
    ((surface, banned),) = rng.choices(SURFACES, SURFACE_WEIGHTS)
    if rng.random() < 0.15 * level:
        color = rng.choice(COLORS)
        surface, banned = COLOR_RANGES[color], (color,)
    shades = surface.choose(rng), surface.choose(rng)
    image = Image.new("RGB", size, shades[0])
    if rng.random() < 0.2 + 0.4 * level:
        image.paste(shades[1], (0, 0), _blend(rng, size))
    return Backdrop(image, shades, tuple(color for color in COLORS if color not in banned))


def _blend(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """How much of the second shade shows where: a slope or a soft random texture."""
    if rng.random() < 0.5:
        turn = rng.choice((None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180))
        slope = Image.linear_gradient("L")
        return (slope if turn is None else slope.transpose(turn)).resize(size, Image.Resampling.NEAREST)
    return patches(rng, size, fewest=3)
