"""Shapes lie where they were put, in the colour asked for, and differ from each other."""

from __future__ import annotations

import random

import pytest
from PIL import Image, ImageChops

from deploy.demo_training.sample import SHAPES
from deploy.demo_training.shape_drawing import choose_turn, draw_shape, outline_for

WHITE, RED = (255, 255, 255), (200, 0, 0)


def _drawn(
    shape: str, center: tuple[float, float] = (60, 50), diameter: float = 60, turn: float = 0
) -> Image.Image:
    image = Image.new("RGB", (120, 100), WHITE)
    draw_shape(image, shape, center, diameter, turn, RED)
    return image


def _ink(image: Image.Image) -> Image.Image:
    return (
        ImageChops.difference(image, Image.new("RGB", image.size, WHITE))
        .convert("L")
        .point(lambda v: 255 * (v > 60))
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_centred_on_its_place_and_about_as_large_as_asked(shape: str) -> None:
    image = _drawn(shape)
    assert image.getpixel((60, 50)) == RED
    box = _ink(image).getbbox()
    assert box is not None
    left, top, right, bottom = box
    assert abs((left + right) / 2 - 60) <= 3 and abs((top + bottom) / 2 - 50) <= 11
    assert 50 <= bottom - top <= 70 and 40 <= right - left <= 70


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_shape_stays_within_its_reach(shape: str) -> None:
    for seed in range(20):
        box = _ink(_drawn(shape, turn=choose_turn(random.Random(seed), shape))).getbbox()
        assert box is not None
        assert box[0] >= 60 - 38 and box[1] >= 50 - 38 and box[2] <= 60 + 38 and box[3] <= 50 + 38


def test_no_two_shapes_are_drawn_alike() -> None:
    inks = [_ink(_drawn(shape)) for shape in SHAPES]
    for index, one in enumerate(inks):
        for other in inks[:index]:
            differing = ImageChops.difference(one, other).histogram()[255]
            assert differing > 0.1 * one.histogram()[255]


def test_edges_are_smooth() -> None:
    shades = _drawn("circle").getcolors(maxcolors=1000)
    assert shades is not None and len(shades) > 4


def test_an_outline_is_drawn_only_where_the_colors_are_close() -> None:
    assert outline_for((250, 250, 250), ((230, 230, 230), (225, 225, 240))) == (20, 20, 20)
    assert outline_for((10, 10, 10), ((50, 45, 45), (30, 30, 30))) == (245, 245, 245)
    assert outline_for((220, 0, 0), (WHITE, WHITE)) is None
