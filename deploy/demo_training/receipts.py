"""Receipts: a shop, goods with prices and a total that is their sum, and questions about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from deploy.demo_training import words
from deploy.demo_training.canvas import background, photograph
from deploy.demo_training.fonts import FontFace, FontShelf, quantized
from deploy.demo_training.lettering import Board, Legibility
from deploy.demo_training.menus import COST, MENU
from deploy.demo_training.phrasing import phrase
from deploy.demo_training.sample import Picture, Sample, Turn

TOTAL = (
    "What is the total?",
    "What is the total amount?",
    "How much is the total?",
    "What does it cost in total?",
    "What is the sum on the receipt?",
    "How much was paid in total?",
    "What is the total of this receipt?",
    "How much is it all together?",
)
SHOP = (
    "Which shop is this receipt from?",
    "What is the name of the shop?",
    "What shop is this receipt from?",
    "Where is this receipt from?",
    "Which store is this receipt from?",
    "What is the shop called?",
    "What is the first line of the receipt?",
    "From which shop is the receipt?",
)
TOTAL_WORDS = ("Total", "TOTAL", "Total", "TOTAL", "Sum", "Amount")
TAX_WORDS = ("Tax", "TAX", "VAT")
LINE_PITCH = 1.5  # in ems
MARGIN = 0.9  # of the paper around the text, in ems
ATTEMPTS = 12
FILL = 0.94  # share of the picture that the paper may take up across and down


@dataclass(frozen=True)
class Receipt:
    """What is printed; amounts in hundredths."""

    shop: str
    items: tuple[tuple[str, int], ...]
    tax: tuple[str, int] | None
    total_word: str
    currency: str  # "$" or nothing

    @property
    def total(self) -> int:
        return sum(amount for _, amount in self.items) + (self.tax[1] if self.tax else 0)

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """Every line below the shop's name."""
        return (*self.items, *((self.tax,) if self.tax else ()), (self.total_word, self.total))

    def printed(self, amount: int) -> str:
        return f"{self.currency}{amount // 100}.{amount % 100:02d}"


@dataclass(frozen=True)
class Print:
    """A receipt set in a face at a size in pixels."""

    receipt: Receipt
    face: FontFace
    em: int

    @property
    def text_width(self) -> float:
        rows = (
            self.face.width(word + self.receipt.printed(amount)) + 1.2 for word, amount in self.receipt.rows
        )
        return max(*rows, self.face.width(self.receipt.shop)) * self.em

    @property
    def paper(self) -> tuple[float, float]:
        """Width and height in pixels."""
        num_lines = len(self.receipt.rows) + 1.6  # the shop's name has more room
        return self.text_width + 2 * MARGIN * self.em, (num_lines * LINE_PITCH + MARGIN) * self.em


def make_receipt(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    """One picture of that size in pixels; the number of goods grows with the level as far as they fit."""
    legibility = Legibility.of(size, fine=rng.random() < level / 2)
    layout = _fitting_print(rng, size, fonts, level, legibility)
    degrees = rng.uniform(-5, 5) * level if rng.random() < 0.5 * level else 0.0
    image = background(rng, size, level)
    tilt = abs(degrees) * 0.0175
    width, height = layout.paper
    spare = (
        max(0.0, size[0] - width - height * tilt) / 2,
        max(0.0, size[1] - height - width * tilt) / 2,
    )
    centre = (size[0] / 2 + rng.uniform(-1, 1) * spare[0], size[1] / 2 + rng.uniform(-1, 1) * spare[1])
    board = Board(image, centre, degrees)
    _print(rng, board, layout)
    picture = Picture(photograph(image, rng, level), tuple(board.marks))
    return Sample(_turns(rng, layout.receipt), (picture,))


def _fitting_print(
    rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float, legibility: Legibility
) -> Print:
    """A legible receipt that fits on the picture; the more attempts fail, the less is on it."""
    for attempt in range(ATTEMPTS):
        is_short = attempt >= ATTEMPTS // 2
        receipt = _receipt(rng, 2 if is_short else rng.randint(2, 2 + round(3 * level)), level, is_short)
        if is_short:
            legibility = Legibility.of(size, fine=True)
        face = fonts.choose(rng)
        lines = (receipt.shop, *(word + receipt.printed(amount) for word, amount in receipt.rows))
        least = Print(receipt, face, max(legibility.em(face, line) for line in lines))
        spare = min(size[0] * FILL / least.paper[0], size[1] * FILL / least.paper[1])
        if spare >= 1:
            share = rng.random() ** (0.4 + 0.6 * level)
            return Print(receipt, face, max(least.em, quantized(least.em * spare**share)))
    # Long and narrow pictures of a single tile: as large as the room allows.
    return Print(receipt, face, max(1, int(least.em * spare)))


def _receipt(rng: random.Random, num_items: int, level: float, is_short: bool) -> Receipt:
    spelled = rng.choice((str.title, str.title, str.upper, str.lower))
    goods = [item for item in MENU if len(item) <= 5] if is_short else MENU
    items = tuple((spelled(item), _amount(rng)) for item in rng.sample(goods, num_items))
    has_tax = not is_short and rng.random() < 0.4 * level
    tax = (rng.choice(TAX_WORDS), rng.randint(10, 299)) if has_tax else None
    shop = words.words_only(rng, 6 if is_short else rng.choice((6, 8, 10, 12)))
    return Receipt(shop, items, tax, rng.choice(TOTAL_WORDS), rng.choice(("", "$")))


def _amount(rng: random.Random) -> int:
    return rng.randint(1, rng.choice((9, 9, 29))) * 100 + rng.randrange(20) * 5


def _print(rng: random.Random, board: Board, layout: Print) -> None:
    (width, height), em, receipt = layout.paper, layout.em, layout.receipt
    tone = rng.randint(225, 255)
    ink = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 70))
    board.panel(
        (-width / 2, -height / 2, width / 2, height / 2), (tone, tone, max(0, tone - rng.randint(0, 20)))
    )
    down = -height / 2 + (MARGIN + 0.5) * em
    board.write(receipt.shop, layout.face, em, (0, down), ink)
    down += 1.6 * LINE_PITCH * em
    half = layout.text_width / 2
    for word, amount in receipt.rows:
        if word == receipt.total_word:
            rule = down - 0.5 * LINE_PITCH * em
            board.panel((-half, rule, half, rule + max(1, em * 0.06)), ink)
            down += 0.1 * em
        board.write(word, layout.face, em, (-half, down), ink, "left")
        board.write(receipt.printed(amount), layout.face, em, (half, down), ink, "right")
        down += LINE_PITCH * em


def _turns(rng: random.Random, receipt: Receipt) -> tuple[Turn, ...]:
    """One to three questions, no two of the same kind but for prices of different goods."""
    turns = [
        Turn("total", phrase(rng, TOTAL), receipt.printed(receipt.total)),
        Turn("read", phrase(rng, SHOP), receipt.shop),
    ]
    for item, amount in rng.sample(receipt.items, 2):
        turns.append(Turn("price", phrase(rng, COST, item=item.lower()), receipt.printed(amount)))
    return tuple(rng.sample(turns, rng.choices((1, 2, 3), (5, 3, 2))[0]))
