"""Objects on a surface that do not touch each other; knows where they are, not what is asked about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from deploy.demo_training.backdrops import Backdrop, make_backdrop
from deploy.demo_training.colors import RGB, choose_rgb
from deploy.demo_training.layouts import lay_out
from deploy.demo_training.sample import SHAPES, Mark
from deploy.demo_training.shape_drawing import choose_turn, draw_shape, outline_for


@dataclass(frozen=True)
class Thing:
    """One drawn object; centre and diameter in pixels."""

    color: str
    shape: str
    x: float
    y: float
    diameter: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    size: tuple[int, int]
    things: tuple[Thing, ...]

    def marks(self) -> tuple[Mark, ...]:
        width, height = self.size
        return tuple(Mark(thing.name, thing.x / width, thing.y / height) for thing in self.things)


def make_scene(
    rng: random.Random, size: tuple[int, int], level: float, most: int | None = None
) -> tuple[Scene, Image.Image]:
    """Up to `most` objects (by default 2 at level 0 and 8 at level 1), and the RGB image of them."""
    backdrop = make_backdrop(rng, size, level)
    spots = lay_out(rng, size, level, most or round(2 + 6 * level))
    kinds = _choose_kinds(rng, backdrop.colors, len(spots))
    things = tuple(
        Thing(color, shape, spot.x, spot.y, spot.diameter)
        for spot, (color, shape) in zip(spots, kinds, strict=True)
    )
    outlined = rng.random() < 0.12 * level
    for thing in things:
        draw_thing(backdrop.image, thing, choose_look(rng, thing, backdrop, outlined))
    return Scene(size, things), backdrop.image


@dataclass(frozen=True)
class Look:
    """What an object's name leaves open; `line` is the colour of its outline, if it has one."""

    fill: RGB
    turn: float  # degrees
    line: RGB | None


def choose_look(rng: random.Random, thing: Thing, backdrop: Backdrop, outlined: bool = False) -> Look:
    """A look that stands out from the backdrop; `outlined` asks for an outline even where none is needed."""
    fill, turn = choose_rgb(rng, thing.color), choose_turn(rng, thing.shape)
    line = outline_for(fill, backdrop.shades)
    if line is None and outlined and thing.color not in ("black", "white"):
        line = (20, 20, 20)
    return Look(fill, turn, line)


def draw_thing(image: Image.Image, thing: Thing, look: Look) -> None:
    """Paints the object onto `image` in place."""
    center, inner = (thing.x, thing.y), thing.diameter
    if look.line is not None:
        draw_shape(image, thing.shape, center, thing.diameter, look.turn, look.line)
        inner -= 2 * max(1.5, 0.05 * thing.diameter)
    draw_shape(image, thing.shape, center, inner, look.turn, look.fill)


def _choose_kinds(rng: random.Random, colors: Sequence[str], count: int) -> list[tuple[str, str]]:
    """(colour, shape) of each object: all different, from few colours and shapes, or nearly all the same."""
    manner = rng.random()
    if manner < 0.4 and count <= len(SHAPES):
        return list(zip(rng.sample(colors, count), rng.sample(SHAPES, count), strict=True))
    if manner < 0.8:
        few_colors, few_shapes = rng.sample(colors, rng.randint(1, 3)), rng.sample(SHAPES, rng.randint(1, 3))
        return [(rng.choice(few_colors), rng.choice(few_shapes)) for _ in range(count)]
    color, shape = rng.choice(colors), rng.choice(SHAPES)
    odd = rng.randrange(count + 1) if rng.random() < 0.6 else count
    return [(color, shape)] * odd + [(rng.choice(colors), rng.choice(SHAPES)) for _ in range(count - odd)]
