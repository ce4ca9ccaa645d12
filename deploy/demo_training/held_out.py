"""Questions that training never saw: other seeds, other fonts, pictures as files in formats that users send.

Knows the makers of samples and the rows of the accuracy table; knows nothing of a server or of the model.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from deploy.demo_training.clips import make_clip
from deploy.demo_training.comparisons import make_comparison
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.kinds import Form, PictureMaker
from deploy.demo_training.receipts import make_receipt
from deploy.demo_training.sample import Sample, Turn
from deploy.demo_training.shapes import make_shapes
from deploy.demo_training.signs import make_sign
from deploy.demo_training.talk import make_talk

SHORT_TEXT = 8  # characters
NUM_QUESTIONS = 500
LEVEL = 1.0
# Training seeds its workers with "SEED/WORKER"; no such text starts with these words.
NAMESPACE = "held-out questions"
JPEG_QUALITIES = (80, 95)

Format = Literal["jpeg", "png"]
Source = Callable[[random.Random, FontShelf], Sample]


# A single tile; 2 x 2; the formats of cameras (3 x 2); wide ones (2 x 1); banners (3 x 1).
SINGLE_PICTURES = (
    (Form(1.0, 1.24, 180, 310), 4),
    (Form(1.0, 1.24, 400, 640), 2),
    (Form(1.26, 1.74, 320, 960), 4),
    (Form(1.76, 2.49, 320, 640), 2),
    (Form(2.51, 3.4, 400, 700), 1),
)
COMPARED = Form(1.0, 1.2, 180, 300)
COMPARED_IN_TILES = (Form(1.3, 1.7, 320, 640), Form(1.8, 2.4, 320, 640))
FRAMES = Form(1.0, 1.6, 200, 300)


@dataclass(frozen=True)
class PictureFile:
    data: bytes
    format: Format


@dataclass(frozen=True)
class Question:
    """What a client asks; of several texts each but the last is only there to be answered first."""

    row: str
    texts: tuple[str, ...]
    answer: str  # to the last of them
    pictures: tuple[PictureFile, ...] = ()  # sent with the first text
    labels: tuple[str, ...] = ()  # text before each picture; empty for none at all
    max_tiles: int | None = None  # of each picture; None leaves it to the model


@dataclass(frozen=True)
class Row:
    """`number` questions of NUM_QUESTIONS; `choose` yields the conversations of a sample that belong here."""

    name: str
    number: int
    sources: tuple[Source, ...]
    choose: Callable[[Sample], Iterator[Sequence[Turn]]]


def held_out_questions(fonts: FontShelf, seed: int, number: int = NUM_QUESTIONS) -> list[Question]:
    """About `number` questions in the order of ROWS, at least one of each row. Same arguments, same bytes."""
    questions = []
    for row in ROWS:
        rng = random.Random(f"{NAMESPACE}/{seed}/{row.name}")
        questions += _questions_of(rng, row, fonts, max(1, round(row.number * number / NUM_QUESTIONS)))
    return questions


def _questions_of(rng: random.Random, row: Row, fonts: FontShelf, number: int) -> list[Question]:
    """No two are the same. Every other sample comes as JPEG, the rest as PNG."""
    questions: dict[Question, None] = {}
    for kind in _alternating():
        sample = rng.choice(row.sources)(rng, fonts)
        pictures = tuple(_encode(rng, picture.image, kind) for picture in sample.pictures)
        for turns in row.choose(sample):
            texts = tuple(turn.question for turn in turns)
            question = Question(row.name, texts, turns[-1].answer, pictures, sample.labels, sample.max_tiles)
            questions.setdefault(question)
            if len(questions) == number:
                return list(questions)
    raise AssertionError("samples never end")


def _alternating() -> Iterator[Format]:
    while True:
        yield "jpeg"
        yield "png"


def _encode(rng: random.Random, image: Image.Image, kind: Format) -> PictureFile:
    file = io.BytesIO()
    if kind == "jpeg":
        image.save(file, "JPEG", quality=rng.randint(*JPEG_QUALITIES))
    else:
        image.save(file, "PNG")
    return PictureFile(file.getvalue(), kind)


def _one_picture(maker: PictureMaker, sizes: Sequence[tuple[Form, int]] = SINGLE_PICTURES) -> Source:
    """Sizes in which nothing legible fits are drawn again, as in training."""
    forms, weights = zip(*sizes, strict=True)

    def make(rng: random.Random, fonts: FontShelf) -> Sample:
        while True:
            (form,) = rng.choices(forms, weights)
            try:
                return maker(rng, form.size(rng), fonts, LEVEL)
            except ValueError:
                continue

    return make


def _comparison(rng: random.Random, fonts: FontShelf) -> Sample:
    """Mostly two to four pictures of one tile each; sometimes two that are cut into tiles."""
    if rng.random() < 0.15:
        sizes = [form.size(rng, portrait=False) for form in rng.sample(COMPARED_IN_TILES, 2)]
        return make_comparison(rng, sizes, fonts, LEVEL, max_tiles=None)
    sizes = [COMPARED.size(rng) for _ in range(rng.choice((2, 2, 3, 4)))]
    return make_comparison(rng, sizes, fonts, LEVEL)


def _clip(rng: random.Random, fonts: FontShelf) -> Sample:
    return make_clip(rng, FRAMES.size(rng), fonts, LEVEL, rng.choice((4, 4, 4, 6, 8)))


def _talk(rng: random.Random, fonts: FontShelf) -> Sample:
    return make_talk(rng)


def _alone(accepts: Callable[[Turn], bool]) -> Callable[[Sample], Iterator[Sequence[Turn]]]:
    """Each accepted turn as a conversation of its own: no turn of the makers leans on an earlier one."""
    return lambda sample: ((turn,) for turn in sample.turns if accepts(turn))


def _of_task(*tasks: str) -> Callable[[Sample], Iterator[Sequence[Turn]]]:
    return _alone(lambda turn: turn.task in tasks)


def _first_two(sample: Sample) -> Iterator[Sequence[Turn]]:
    if len(sample.turns) > 1:
        yield sample.turns[:2]


_SIGN, _SHAPES = _one_picture(make_sign), _one_picture(make_shapes)
# No receipt is printed on a banner; training has none either.
_RECEIPT = _one_picture(make_receipt, SINGLE_PICTURES[:-1])

ROWS = (
    Row(
        "reading (up to 8 characters)",
        *(125, (_SIGN,), _alone(lambda turn: turn.task == "read" and len(turn.answer) <= SHORT_TEXT)),
    ),
    Row(
        "reading (longer, several lines)",
        *(40, (_SIGN,), _alone(lambda turn: turn.task == "read" and len(turn.answer) > SHORT_TEXT)),
    ),
    Row("receipts, price boards", 30, (_RECEIPT, _SIGN), _of_task("total", "price")),
    Row("color", 35, (_SHAPES,), _of_task("color")),
    Row("shape", 30, (_SHAPES,), _of_task("shape")),
    Row("count", 40, (_SHAPES,), _of_task("count")),
    Row("place", 40, (_SHAPES,), _of_task("place")),
    Row("yes/no", 15, (_SHAPES,), _of_task("yes_no")),
    Row("multi-image", 50, (_comparison,), _of_task("multi_image")),
    Row("motion", 45, (_clip,), _of_task("motion")),
    Row("second turn", 40, (_SIGN, _RECEIPT, _SHAPES, _SHAPES), _first_two),
    Row("talk", 10, (_talk,), _of_task("talk")),
)
