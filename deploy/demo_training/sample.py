"""One training example: pictures, and a conversation about them with the right answers."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "hexagon")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray")
CHARACTERS = "".join(chr(code) for code in range(33, 127))

# What the training-only head tells apart: every printable character and every coloured shape.
MARK_LABELS = (*CHARACTERS, *(f"{color} {shape}" for color in COLORS for shape in SHAPES))


@dataclass(frozen=True)
class Mark:
    """Centre of a character or an object, in shares of the picture's width and height (0 to 1)."""

    label: str  # one of MARK_LABELS
    x: float
    y: float


@dataclass(frozen=True)
class Picture:
    image: Image.Image  # RGB
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A question and its only right answer; `task` names the row of the accuracy table."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A conversation; the pictures belong to its first turn."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    labels: tuple[str, ...] = ()  # text before each picture ("Frame1: "); empty for none at all
    max_tiles: int | None = None  # of each picture; None leaves it to the model
