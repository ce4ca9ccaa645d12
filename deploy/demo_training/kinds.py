"""The mixture that is trained on: what is asked about pictures of which size, how often and how hard."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from deploy.demo_training.clips import make_clip
from deploy.demo_training.comparisons import make_comparison
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.receipts import make_receipt
from deploy.demo_training.sample import Sample
from deploy.demo_training.shapes import make_shapes
from deploy.demo_training.signs import make_sign

Size = tuple[int, int]
PictureMaker = Callable[[random.Random, Size, FontShelf, float], Sample]
Maker = Callable[[random.Random, FontShelf, float], Sample]

TILE = 224
UNSCALED = 0.4  # share of small pictures that are one tile as they are: resizing is a third of their cost
EASY_UNTIL = 0.1  # share of the training in which there are single tiles only
HARDEST_FROM = 0.405  # share from which pictures may be as hard as the test's


@dataclass(frozen=True)
class Form:
    """Aspect ratios (longer by shorter side) and pixels of the longer side, each a range."""

    least_ratio: float
    most_ratio: float
    shortest: int
    longest: int

    def size(self, rng: random.Random, portrait: bool = True) -> Size:
        """Width and height; two in five stand upright unless `portrait` forbids it."""
        longer = rng.randint(self.shortest, self.longest)
        shorter = max(1, round(longer / rng.uniform(self.least_ratio, self.most_ratio)))
        return (shorter, longer) if portrait and rng.random() < 0.4 else (longer, shorter)


# By the number of their tiles: 1, 3, 4, 5 (with the thumbnail), 7.
SQUARE = Form(1.0, 1.19, 180, 310)
WIDE = Form(1.8, 2.45, 300, 640)
BANNER = Form(2.6, 3.4, 320, 700)
LARGE = Form(1.0, 1.19, 400, 640)
FULL = Form(1.28, 1.72, 320, 960)


@dataclass(frozen=True)
class Kind:
    """Samples that all have `num_tiles` tiles; `frequency` is relative, once training is past EASY_UNTIL."""

    num_tiles: int
    frequency: float
    makers: tuple[tuple[float, Maker], ...]  # each with its share

    def make(self, rng: random.Random, fonts: FontShelf, progress: float) -> Sample:
        """One sample; sizes near a boundary between two grids may come out with another number of tiles."""
        shares = [share for share, _ in self.makers]
        makers = [maker for _, maker in self.makers]
        (maker,) = rng.choices(makers, shares)
        return maker(rng, fonts, level(rng, progress))


def level(rng: random.Random, progress: float) -> float:
    """Difficulty 0 to 1: its ceiling rises with the training, and most samples are near the ceiling."""
    ceiling = min(1.0, 0.1 + 0.9 * progress / HARDEST_FROM)
    return ceiling * math.sqrt(rng.random())


def choose_kind(rng: random.Random, progress: float) -> Kind:
    if progress < EASY_UNTIL:
        return KINDS[0]
    return rng.choices(KINDS, [kind.frequency for kind in KINDS])[0]


def _pictures(maker: PictureMaker, form: Form) -> Maker:
    """`maker` on pictures of that form. Sizes in which nothing legible fits are drawn again."""

    def make(rng: random.Random, fonts: FontShelf, level: float) -> Sample:
        while True:
            unscaled = form is SQUARE and rng.random() < UNSCALED
            size = (TILE, TILE) if unscaled else form.size(rng)
            try:
                return maker(rng, size, fonts, level)
            except ValueError:
                continue

    return make


def _clip(num_frames: int) -> Maker:
    def make(rng: random.Random, fonts: FontShelf, level: float) -> Sample:
        return make_clip(rng, Form(1.0, 1.6, 200, 300).size(rng), fonts, level, num_frames)

    return make


def _comparison(num_pictures: int) -> Maker:
    def make(rng: random.Random, fonts: FontShelf, level: float) -> Sample:
        sizes = [Form(1.0, 1.2, 180, 300).size(rng) for _ in range(num_pictures)]
        return make_comparison(rng, sizes, fonts, level)

    return make


def _large_comparison(rng: random.Random, fonts: FontShelf, level: float) -> Sample:
    """Two pictures of several tiles each: 7 and 3."""
    sizes = [Form(1.3, 1.7, 320, 640).size(rng), Form(1.8, 2.4, 320, 640).size(rng, portrait=False)]
    rng.shuffle(sizes)
    return make_comparison(rng, sizes, fonts, level, max_tiles=None)


def _mix(form: Form, signs: float, receipts: float, shapes: float) -> tuple[tuple[float, Maker], ...]:
    shares = ((signs, make_sign), (receipts, make_receipt), (shapes, make_shapes))
    return tuple((share, _pictures(maker, form)) for share, maker in shares if share)


KINDS = (
    Kind(1, 0.45, _mix(SQUARE, 0.58, 0.12, 0.30)),
    Kind(2, 0.08, ((1, _comparison(2)),)),
    Kind(3, 0.10, (*_mix(WIDE, 0.35, 0.15, 0.20), (0.30, _comparison(3)))),
    Kind(4, 0.12, (*_mix(BANNER, 0.15, 0.0, 0.10), (0.60, _clip(4)), (0.15, _comparison(4)))),
    Kind(5, 0.06, _mix(LARGE, 0.50, 0.20, 0.30)),
    Kind(6, 0.03, ((1, _clip(6)),)),
    Kind(7, 0.11, _mix(FULL, 0.50, 0.15, 0.35)),
    Kind(8, 0.02, ((1, _clip(8)),)),
    Kind(10, 0.03, ((1, _large_comparison),)),
)
