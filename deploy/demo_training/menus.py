"""Price boards: a heading, goods and what they cost, and questions about the prices."""

from __future__ import annotations

import random
from dataclasses import dataclass

from deploy.demo_training import words
from deploy.demo_training.canvas import text_color
from deploy.demo_training.colors import RGB, choose_rgb
from deploy.demo_training.fonts import FontFace, FontShelf
from deploy.demo_training.lettering import Board, Legibility
from deploy.demo_training.phrasing import phrase
from deploy.demo_training.sample import COLORS, Turn

COST = (
    "What does the {item} cost?",
    "How much is the {item}?",
    "What is the price of the {item}?",
    "How much does the {item} cost?",
    "What does {item} cost?",
    "How much is {item}?",
    "How much do I pay for the {item}?",
)
BOARD_TITLE = (
    "What is the title of the board?",
    "What is the first line of the board?",
    "What is written at the top of the board?",
    "What is the heading of the board?",
    "What does the top line of the board say?",
    "Read the heading of the board.",
)
MENU = (
    "coffee tea cake juice milk soup bread salad pizza pasta toast cocoa water cola lemonade waffle "
    "muffin donut cookie pie bagel burger fries rice sandwich latte mocha espresso soda beer wine cider "
    "apple banana honey jam butter cheese eggs fish omelet pancake croissant yogurt smoothie"
).split()
TITLES = (
    "TODAY",
    "MENU",
    "Menu",
    "Today",
    "PRICES",
    "SPECIALS",
    "LUNCH",
    "Drinks",
    "SNACKS",
    "Cafe",
    "TO GO",
    "Bar",
)


@dataclass(frozen=True)
class MenuBoard:
    """A heading and goods with their prices, as wide as its widest line plus a gap."""

    title: str
    items: tuple[tuple[str, str], ...]  # as printed: goods, price
    face: FontFace
    em: int

    @classmethod
    def compose(cls, rng: random.Random, fonts: FontShelf, em_of: Legibility, num_items: int) -> MenuBoard:
        face = fonts.choose(rng)
        spelled = rng.choice((str.title, str.title, str.upper, str.lower))
        sign = rng.choice(("", "", "$"))
        items = tuple((spelled(item), words.price(rng, sign)) for item in rng.sample(MENU, num_items))
        em = max(em_of.em(face, "".join(item)) for item in items)
        return cls(rng.choice(TITLES), items, face, em)

    @property
    def width(self) -> float:
        rows = (self.face.width(item + price) for item, price in self.items)
        return (max(*rows, self.face.width(self.title) - 1) + 1.0) * self.em

    @property
    def height(self) -> float:
        return (len(self.items) * 1.45 + 1.0) * self.em

    @property
    def room(self) -> tuple[float, float]:
        """Width and height with the margins around the text."""
        return self.width + self.em, self.height + 0.8 * self.em

    def write(self, board: Board, middle: tuple[float, float], color: RGB, title_color: RGB) -> None:
        pitch = self.height / (len(self.items) + 1)
        down = middle[1] - self.height / 2 + pitch / 2
        board.write(self.title, self.face, self.em, (middle[0], down), title_color)
        for number, (item, price) in enumerate(self.items, 1):
            place = down + number * pitch
            board.write(item, self.face, self.em, (middle[0] - self.width / 2, place), color, "left")
            board.write(price, self.face, self.em, (middle[0] + self.width / 2, place), color, "right")

    def turn(self, rng: random.Random) -> Turn:
        item, price = rng.choice(self.items)
        return Turn("price", phrase(rng, COST, item=item.lower()), price)

    def title_turn(self, rng: random.Random) -> Turn:
        return Turn("read", phrase(rng, BOARD_TITLE), self.title)


def draw_menu(
    rng: random.Random, board: Board, menu: MenuBoard, middle: tuple[float, float] = (0, 0)
) -> None:
    """A framed dark or light panel of `menu.room` with the menu on it, around a place on the board."""
    room = menu.room
    dark = rng.random() < 0.6
    level = rng.randint(10, 45) if dark else rng.randint(225, 255)
    panel = (level, min(255, level + rng.randint(0, 8)), min(255, level + rng.randint(0, 8)))
    left, top = middle[0] - room[0] / 2, middle[1] - room[1] / 2
    box = (left, top, left + room[0], top + room[1])
    rim = 0.2 * menu.em
    board.panel((box[0] - rim, box[1] - rim, box[2] + rim, box[3] + rim), choose_rgb(rng, rng.choice(COLORS)))
    board.panel(box, panel)
    color = text_color(rng, panel)[1]
    menu.write(board, middle, color, text_color(rng, panel)[1] if rng.random() < 0.5 else color)
