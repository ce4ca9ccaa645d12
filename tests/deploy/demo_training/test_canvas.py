"""Surfaces, readable colours and the effects of a camera."""

import random

import pytest
from PIL import Image, ImageChops

from deploy.demo_training.canvas import (
    MIN_CONTRAST,
    background,
    contrast,
    gradient,
    near,
    photograph,
    random_rgb,
    text_color,
)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((255, 0, 0), (255, 0, 0)) == 1
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.1)


def test_text_can_be_read_on_every_panel() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        panel = random_rgb(rng)
        assert contrast(text_color(rng, panel)[1], panel) >= MIN_CONTRAST


def test_a_gradient_runs_between_its_colours() -> None:
    image = gradient(random.Random(1), (60, 40), (10, 200, 30), (250, 20, 90))
    for found, wanted in zip(image.getextrema(), ((10, 250), (20, 200), (30, 90)), strict=True):
        assert found == pytest.approx(wanted, abs=6)


def test_near_stays_within_the_spread() -> None:
    rng = random.Random(0)
    for _ in range(200):
        assert all(abs(a - b) <= 9 for a, b in zip(near(rng, (3, 128, 252), 9), (3, 128, 252), strict=True))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_backgrounds_depend_on_the_state_alone(level: float) -> None:
    for seed in range(30):
        images = [background(random.Random(seed), (90, 70), level) for _ in range(2)]
        assert images[0].mode == "RGB" and images[0].size == (90, 70)
        assert images[0].tobytes() == images[1].tobytes()


def test_photographs_keep_size_and_colours_roughly_and_most_change_little() -> None:
    plain = Image.new("RGB", (120, 80), (200, 60, 60))
    changed = 0
    for seed in range(100):
        taken, again = (photograph(plain.copy(), random.Random(seed), 1.0) for _ in range(2))
        assert taken.tobytes() == again.tobytes() and taken.size == plain.size and taken.mode == "RGB"
        red, green, blue = taken.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))  # type: ignore[misc]
        assert red > green + 60 and red > blue + 60
        changed += ImageChops.difference(taken, plain).getbbox() is not None
    assert 20 <= changed <= 75
