"""A picture of one short line of text on a panel: what comparisons put beside pictures of shapes."""

from __future__ import annotations

import random

from deploy.demo_training.canvas import background, photograph, random_rgb, text_color
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.lettering import Board, Legibility, TextBlock, fitting_em
from deploy.demo_training.sample import Picture
from deploy.demo_training.words import text_to_read

LONGEST_TEXT = 8  # characters


def make_notice(
    rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float
) -> tuple[str, Picture]:
    """The text and its picture; it can be read from a single tile."""
    text, face, panel = text_to_read(rng, LONGEST_TEXT), fonts.choose(rng), random_rgb(rng)
    _, color = text_color(rng, panel)
    largest = fitting_em(face, (text,), (0.85 * size[0], 0.6 * size[1]))
    smallest = min(largest, max(Legibility.of(size).em(face, text), round((0.7 - 0.5 * level) * largest)))
    block = TextBlock((text,), face, rng.randint(smallest, largest))
    # Half of the panel, as it is padded for letters that reach over their line.
    reach = min(size[0] / 2, block.width * 0.55), min(size[1] / 2, block.height * 0.5 + block.em * 0.45)
    centre = tuple(
        half + rng.random() * (side - 2 * half) * level + (1 - level) * (side / 2 - half)
        for side, half in zip(size, reach, strict=True)
    )
    board = Board(background(rng, size, level), (centre[0], centre[1]))
    board.panel((-reach[0], -reach[1], *reach), panel)
    block.write(board, (0, 0), color)
    return text, Picture(photograph(board.image, rng, level), tuple(board.marks))
