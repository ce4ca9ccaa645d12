"""A shop front: the signboard has the largest text; plate, house number and price board are optional."""

from __future__ import annotations

import random

from PIL import ImageDraw

from deploy.demo_training import words
from deploy.demo_training.canvas import gradient, near, random_rgb, text_color
from deploy.demo_training.colors import RGB, choose_rgb
from deploy.demo_training.fonts import FontFace, FontShelf, quantized
from deploy.demo_training.lettering import Board, Legibility, fitting_em, tile_grid
from deploy.demo_training.menus import MenuBoard, draw_menu
from deploy.demo_training.phrasing import phrase
from deploy.demo_training.sample import COLORS, Turn

READ_SIGN = (
    "What does the sign say?",
    "What does the sign say?",
    "What does the big sign say?",
    "Read the sign.",
    "What is written on the sign?",
    "What is written on the signboard?",
    "What is the name of the shop?",
    "What does the sign above the window say?",
)
DOOR_NUMBER = (
    "What number is on the door?",
    "Which number is on the door?",
    "What is the house number?",
    "What is the number on the door?",
    "What is the number of the house?",
    "Read the house number.",
)
DOOR_SIGN = (
    "What does the sign on the door say?",
    "What is written on the door?",
    "What does the plate on the door say?",
    "Read the sign on the door.",
    "What does it say on the door?",
    "Which word is on the door?",
)
DOOR_PLATES = ("OPEN", "OPEN", "CLOSED", "PUSH", "PULL", "ENTER", "SALE", "EXIT", "Open", "Closed", "Welcome")


class Street:
    """Draws one scene from the sky down; every part takes its place from what stands already."""

    def __init__(self, rng: random.Random, size: tuple[int, int], fonts: FontShelf) -> None:
        self._rng = rng
        self._fonts = fonts
        self._width, self._height = size
        sky = gradient(rng, size, self._near((110, 160, 210), 50), self._near((170, 200, 225), 40))
        self.board = Board(sky, (0.0, 0.0))
        self._draw = ImageDraw.Draw(sky)
        self._left, self._right = rng.uniform(0.02, 0.2), rng.uniform(0.78, 0.98)
        self._roof, self._ground = rng.uniform(0.04, 0.2), rng.uniform(0.76, 0.9)
        self._legible = Legibility.of(size)
        self._fine = Legibility.of(size, fine=True)
        self._sign_em = 0

    def draw(self) -> list[Turn]:
        """All parts; returns a question about each text, the one about the sign first."""
        self._draw_neighbours()
        self._draw_house()
        turns = [self._write_sign()]
        self._draw_things()
        split = self._rng.uniform(0.52, 0.68)
        self._draw_window(self._left + 0.03, self._left + (self._right - self._left) * split)
        turns += self._draw_door(self._left + (self._right - self._left) * split + 0.03)
        columns, rows = tile_grid((self._width, self._height))
        if columns * rows >= 4 and self._rng.random() < 0.6:
            turns += self._stand_menu()
        return turns

    def _draw_neighbours(self) -> None:
        rng = self._rng
        for left, right in ((0.0, self._left), (self._right, 1.0)):
            top = rng.uniform(0.0, 0.25)
            self._box((left, top, right, self._ground), random_rgb(rng))
            pane = random_rgb(rng)
            for row in range(rng.randint(2, 4)):
                down = top + 0.06 + row * 0.17
                self._box((left + 0.02, down, right - 0.02, down + 0.09), pane, (230, 230, 225))

    def _draw_house(self) -> None:
        rng = self._rng
        wall = random_rgb(rng)
        self._box((self._left, self._roof, self._right, self._ground), wall)
        for line in range(rng.choice((0, 0, 12))):
            down = (self._roof + line * 0.06) * self._height
            if down < self._ground * self._height:
                ends = (self._left * self._width, down, self._right * self._width, down)
                self._draw.line(ends, fill=self._near(wall, 12))
        if rng.random() < 0.5:
            self._box((self._left - 0.02, self._roof - 0.03, self._right + 0.02, self._roof), random_rgb(rng))
        self._box((0.0, self._ground, 1.0, 1.0), self._near((150, 150, 145), 40))
        if rng.random() < 0.6:
            self._box((0.0, (self._ground + 1.3) / 2.3, 1.0, 1.0), self._near((70, 70, 75), 25))

    def _write_sign(self) -> Turn:
        rng = self._rng
        house = (self._right - self._left) * self._width
        text, face, em = self._choose_sign(house * rng.uniform(0.6, 0.86))
        self._sign_em = em
        panel = choose_rgb(rng, rng.choice(COLORS)) if rng.random() < 0.6 else random_rgb(rng)
        middle = (self._left * self._width + house / 2, (self._roof + 0.13) * self._height)
        half_width = rng.uniform(face.width(text) * em / 2 + 0.4 * em, house / 2)
        half_height = min(em * rng.uniform(0.62, 0.85), 0.11 * self._height)
        box = (
            middle[0] - half_width,
            middle[1] - half_height,
            middle[0] + half_width,
            middle[1] + half_height,
        )
        color = text_color(rng, panel)[1]
        radius = rng.choice((0, 0, 0.2, 0.4)) * em
        if rng.random() < 0.4:
            rim = 0.1 * em
            self.board.panel(
                (box[0] - rim, box[1] - rim, box[2] + rim, box[3] + rim), self._near(panel, 60), radius
            )
        self.board.panel(box, panel, radius)
        self.board.write(text, face, em, middle, color)
        return Turn("read", phrase(rng, READ_SIGN), text)

    def _choose_sign(self, room: float) -> tuple[str, FontFace, int]:
        """A name that fits into a width in pixels, large enough to be read from the thumbnail."""
        rng = self._rng
        max_chars = rng.choice((8, 10, 12, 14))
        while True:
            face = self._fonts.choose(rng)
            write = words.words_only if rng.random() < 0.7 else words.text_to_read
            text = write(rng, max_chars)
            em = fitting_em(face, (text,), (room, 0.1 * self._height))
            least = self._legible.em(face, text)
            if em >= least:
                return text, face, max(least, quantized(em * rng.uniform(0.75, 1)))
            max_chars = max(2, max_chars - 1)

    def _draw_window(self, left: float, right: float) -> None:
        rng = self._rng
        top, bottom = self._roof + 0.3, self._ground - rng.uniform(0.05, 0.12)
        frame, glass = random_rgb(rng), self._near((70, 100, 120), 45)
        self._box((left, top, right, bottom), frame)
        edge = 0.012
        self._box((left + edge, top + edge, right - edge, bottom - edge), glass)
        if rng.random() < 0.6:
            middle = (left + right) / 2
            self._box((middle - edge / 2, top, middle + edge / 2, bottom), frame)
        for _ in range(rng.randint(0, 5)):
            across = rng.uniform(left + 0.03, right - 0.06)
            self._thing((across, bottom - 0.07, across + rng.uniform(0.02, 0.04), bottom - edge))
        if rng.random() < 0.6:
            self._draw_awning(left - 0.015, right + 0.015, top - 0.04)

    def _draw_awning(self, left: float, right: float, top: float) -> None:
        rng = self._rng
        colors = choose_rgb(rng, rng.choice(COLORS)), self._near((240, 236, 225), 15)
        stripes = rng.randint(5, 11)
        for number in range(stripes):
            start = left + (right - left) * number / stripes
            stop = left + (right - left) * (number + 1) / stripes
            self._box((start, top, stop, top + 0.09), colors[number % 2])

    def _draw_door(self, left: float) -> list[Turn]:
        rng = self._rng
        right = min(self._right - 0.02, left + rng.uniform(0.12, 0.2))
        top = self._roof + rng.uniform(0.28, 0.34)
        tall, door = self._ground - top, random_rgb(rng)
        self._box((left, top, right, self._ground), door, self._near(door, 40))
        middle, turns = (left + right) / 2 * self._width, []
        if rng.random() < 0.6:
            glass = self._near((110, 150, 165), 40)
            self._box((left + 0.02, top + 0.03, right - 0.02, top + 0.55 * tall), glass)
        plate = rng.choice(DOOR_PLATES) if rng.random() < 0.7 else words.text_to_read(rng, 6)
        room = (right - left) * self._width
        down = (top + 0.3 * tall) * self._height
        if rng.random() < 0.6 and self._write_small(
            plate, (middle, down), room, self._near((240, 240, 235), 15)
        ):
            turns.append(Turn("read", phrase(rng, DOOR_SIGN), plate))
        number = str(rng.choice((rng.randint(2, 9), rng.randint(12, 99))))
        down = (top + 0.75 * tall) * self._height
        if rng.random() < 0.6 and self._write_small(number, (middle, down), room, door, has_panel=False):
            turns.append(Turn("read", phrase(rng, DOOR_NUMBER), number))
        return turns

    def _write_small(
        self, text: str, middle: tuple[float, float], room: float, panel: RGB, has_panel: bool = True
    ) -> bool:
        """Writes a text clearly smaller than the sign's; False where it could not be read."""
        face = self._fonts.choose(self._rng)
        em = min(
            fitting_em(face, (text,), (room * 0.8, 0.06 * self._height)), quantized(self._sign_em * 0.75)
        )
        if em < self._fine.em(face, text):
            return False
        if has_panel:
            half_width, half_height = face.width(text) * em / 2 + 0.25 * em, 0.6 * em
            box = (
                middle[0] - half_width,
                middle[1] - half_height,
                middle[0] + half_width,
                middle[1] + half_height,
            )
            self.board.panel(box, panel, 0.15 * em)
        self.board.write(text, face, em, middle, text_color(self._rng, panel)[1])
        return True

    def _draw_things(self) -> None:
        for _ in range(self._rng.randint(0, 6)):
            size = self._rng.uniform(0.02, 0.08)
            across = self._rng.uniform(0, 1 - size)
            self._thing((across, self._ground - size * 0.8, across + size, self._ground + size * 0.8))

    def _stand_menu(self) -> list[Turn]:
        """A price board on the pavement, at the edge of the picture, if a legible one has room there."""
        rng = self._rng
        menu = MenuBoard.compose(rng, self._fonts, self._fine, rng.randint(2, 4))
        width, height = menu.room
        if width > 0.32 * self._width or height > 0.4 * self._height or menu.em > 0.8 * self._sign_em:
            return []
        middle = self._width - width / 2 - 0.02 * self._width, self._height * 0.97 - height / 2
        left, top = middle[0] - 0.6 * width, middle[1] - 0.6 * height
        if any(mark.x * self._width > left and mark.y * self._height > top for mark in self.board.marks):
            return []  # it would hide a text
        draw_menu(rng, self.board, menu, middle)
        return [menu.turn(rng), menu.title_turn(rng)]

    def _thing(self, box: tuple[float, float, float, float]) -> None:
        color = random_rgb(self._rng)
        if self._rng.random() < 0.5:
            self._draw.ellipse(self._pixels(box), fill=color)
        else:
            self._box(box, color)

    def _box(self, box: tuple[float, float, float, float], color: RGB, edge: RGB | None = None) -> None:
        """A rectangle given in shares of the picture."""
        left, top, right, bottom = self._pixels(box)
        if right >= left and bottom >= top:
            self._draw.rectangle((left, top, right, bottom), color, edge, max(1, round(self._width * 0.006)))

    def _pixels(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        width, height = self._width, self._height
        return box[0] * width, box[1] * height, box[2] * width, box[3] * height

    def _near(self, color: RGB, spread: int) -> RGB:
        return near(self._rng, color, spread)
