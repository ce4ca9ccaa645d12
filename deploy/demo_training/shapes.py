"""Samples about one picture of coloured shapes: colour, shape, count, place, yes or no, description."""

from __future__ import annotations

import random

from deploy.demo_training.canvas import photograph
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.sample import Picture, Sample, Turn
from deploy.demo_training.scenes import Scene, make_scene
from deploy.demo_training.shape_questions import (
    Asker,
    ask_color,
    ask_count,
    ask_describe,
    ask_place,
    ask_shape,
    ask_yes_no,
)

ASKERS: tuple[tuple[Asker, int], ...] = (
    (ask_color, 3),
    (ask_shape, 2),
    (ask_count, 5),
    (ask_place, 7),
    (ask_yes_no, 3),
    (ask_describe, 2),
)
TRIES = 4
TURN_WEIGHTS = (2, 3, 3, 2)  # of conversations of 1, 2, 3 and 4 questions


def make_shapes(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    """1 to 8 objects and 1 to 4 questions about them; higher levels (0 to 1) have more and smaller ones."""
    scene, image = make_scene(rng, size, level)
    picture = Picture(photograph(image, rng, level), scene.marks())
    (count,) = rng.choices(range(1, len(TURN_WEIGHTS) + 1), TURN_WEIGHTS)
    return Sample(ask(rng, scene, count), (picture,))


def ask(rng: random.Random, scene: Scene, count: int) -> tuple[Turn, ...]:
    """`count` different questions; the same thing may come up in other words, never with another answer."""
    askers, weights = zip(*ASKERS, strict=True)
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        (asker,) = rng.choices(askers, weights)
        # Several tries, or the questions that few scenes offer would hardly ever come up.
        turn = next(filter(None, (asker(rng, scene) for _ in range(TRIES))), None)
        if turn is not None:
            turns.setdefault(turn.question.lower().rstrip("?.!"), turn)
    return tuple(turns.values())
