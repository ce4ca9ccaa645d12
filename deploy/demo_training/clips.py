"""Samples about the frames of a clip in which one object moves, or rests, among others that stand still."""

from __future__ import annotations

import random
from dataclasses import replace

from deploy.demo_training.backdrops import make_backdrop
from deploy.demo_training.canvas import photograph
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.layouts import smallest_diameter
from deploy.demo_training.phrasing import phrase
from deploy.demo_training.sample import SHAPES, Picture, Sample, Turn
from deploy.demo_training.scenes import Scene, Thing, choose_look, draw_thing

# (unit vector, y pointing down)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
AT_REST = "it does not move"
LARGEST_DRIFT = 0.3  # pixels aside of the direction per pixel along it
WHICH_WAY = (
    "Which way does the {thing} move?",
    "Which way is the {thing} moving?",
    "In which direction is the {thing} moving?",
    "In which direction does the {thing} move?",
    "What direction does the {thing} move in?",
    "Where does the {thing} go?",
    "Where is the {thing} going?",
    "Which way does the {thing} go?",
    "What is the direction of the {thing}?",
    "How does the {thing} move?",
    "Does the {thing} move left, right, up or down?",
    "Which direction does the {thing} travel?",
)
WHAT_COLOR = (
    "What color is the {thing}?",
    "Which color is the {thing}?",
    "What color does the {thing} have?",
    "And what color is the {thing}?",
    "Tell me the color of the {thing}.",
    "What is the color of the {thing}?",
)


def make_clip(
    rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float, num_frames: int
) -> Sample:
    """`num_frames` (at least 2) pictures of `size`.

    The path is at least 35 % (at level 1: 20 %) of the side along which the object moves.
    """
    assert num_frames >= 2
    backdrop = make_backdrop(rng, size, level)
    direction = None if rng.random() < 0.1 else rng.choice(tuple(DIRECTIONS))
    shape = "circle" if rng.random() < 0.55 else rng.choice(SHAPES)
    diameter = rng.uniform(smallest_diameter(size, level), 0.33 * min(size))
    path = _path(rng, size, level, diameter, direction, num_frames)
    mover = Thing(rng.choice(backdrop.colors), shape, *path[0], diameter)
    look = choose_look(rng, mover, backdrop)
    still = _bystanders(rng, size, level, backdrop.colors, mover, path)
    for thing in still:
        draw_thing(backdrop.image, thing, choose_look(rng, thing, backdrop))
    pictures, camera = [], rng.getrandbits(32)
    for x, y in path:
        frame, moved = backdrop.image.copy(), replace(mover, x=x, y=y)
        draw_thing(frame, moved, look)
        # One camera takes all frames: what it does to one, it does to all.
        taken = photograph(frame, random.Random(camera), level)
        pictures.append(Picture(taken, Scene(size, (*still, moved)).marks()))
    labels = () if rng.random() < 0.25 else tuple(f"Frame{number}: " for number in range(1, num_frames + 1))
    return Sample(_turns(rng, mover, still, direction), tuple(pictures), labels, max_tiles=1)


def _path(
    rng: random.Random,
    size: tuple[int, int],
    level: float,
    diameter: float,
    direction: str | None,
    num_frames: int,
) -> list[tuple[float, float]]:
    """The object's centre in each frame, at least its radius away from the border."""
    margin = 0.6 * diameter
    rooms = [side - 2 * margin for side in size]
    if direction is None:
        spot = margin + rng.random() * rooms[0], margin + rng.random() * rooms[1]
        return [spot] * num_frames
    step = DIRECTIONS[direction]
    axis = 0 if step[0] else 1
    shortest = min(rooms[axis], (0.35 - 0.15 * level) * size[axis])
    length = rng.uniform(shortest, rooms[axis])
    drift = min(rooms[1 - axis], LARGEST_DRIFT * length * rng.random() * level) * rng.choice((-1, 1))
    moves = [0.0, 0.0]
    moves[axis], moves[1 - axis] = step[axis] * length, drift
    start = [
        margin + max(0.0, -move) + rng.random() * (room - abs(move))
        for move, room in zip(moves, rooms, strict=True)
    ]
    return [(start[0] + share * moves[0], start[1] + share * moves[1]) for share in _shares(rng, num_frames)]


def _shares(rng: random.Random, num_frames: int) -> list[float]:
    """How much of the path is behind the object in each frame: from 0 to 1, in steps that differ a little."""
    steps = [rng.uniform(0.7, 1.3) for _ in range(num_frames - 1)]
    return [sum(steps[:frame]) / sum(steps) for frame in range(num_frames)]


def _bystanders(
    rng: random.Random,
    size: tuple[int, int],
    level: float,
    colors: tuple[str, ...],
    mover: Thing,
    path: list[tuple[float, float]],
) -> tuple[Thing, ...]:
    """Objects of other shapes and colours than the mover's, out of its way and of each other's."""
    wanted = rng.choice((0, 0, 1, 1, 2, 3)) if rng.random() < 0.3 + 0.5 * level else 0
    shapes = rng.sample([shape for shape in SHAPES if shape != mover.shape], wanted)
    hues = rng.sample([color for color in colors if color != mover.color], wanted)
    boxes = [_box(path, mover.diameter)]
    found: list[Thing] = []
    for shape, color in zip(shapes, hues, strict=True):
        for _ in range(8):
            diameter = rng.uniform(smallest_diameter(size, level), 0.3 * min(size))
            x, y = (rng.uniform(0.65 * diameter, side - 0.65 * diameter) for side in size)
            box = _box([(x, y)], diameter)
            if not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                found.append(Thing(color, shape, x, y, diameter))
                break
    return tuple(found)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _box(points: list[tuple[float, float]], diameter: float) -> Box:
    reach = 0.65 * diameter
    xs, ys = zip(*points, strict=True)
    return min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _turns(
    rng: random.Random, mover: Thing, bystanders: tuple[Thing, ...], direction: str | None
) -> tuple[Turn, ...]:
    asked, answer = mover, direction or AT_REST
    if bystanders and rng.random() < 0.05:
        asked, answer = rng.choice(bystanders), AT_REST
    turns = [Turn("motion", phrase(rng, WHICH_WAY, thing=_name(rng, asked, not bystanders)), answer)]
    if rng.random() < 0.3:
        name = "ball" if asked.shape == "circle" and rng.random() < 0.6 else asked.shape
        turns.append(Turn("color", phrase(rng, WHAT_COLOR, thing=name), asked.color))
    return tuple(turns)


def _name(rng: random.Random, thing: Thing, alone: bool) -> str:
    """Words for an object whose shape and colour no other object has; a circle is a ball as often as not."""
    names = [thing.shape, thing.name, f"{thing.color} {rng.choice(('object', 'shape', 'one'))}"]
    if alone:
        names.append(rng.choice(("object", "shape")))
    if thing.shape == "circle" and rng.random() < 0.6:
        names = ["ball", "ball", f"{thing.color} ball"]
    return rng.choice(names)
