"""Pictures of signs, price boards and shop fronts, with questions about what is written on them."""

from __future__ import annotations

import random

from deploy.demo_training import words
from deploy.demo_training.canvas import background, gradient, near, photograph, random_rgb, text_color
from deploy.demo_training.colors import RGB, choose_rgb
from deploy.demo_training.fonts import FontShelf, quantized
from deploy.demo_training.lettering import Board, Legibility, TextBlock, fitting_em
from deploy.demo_training.menus import MenuBoard, draw_menu
from deploy.demo_training.phrasing import phrase
from deploy.demo_training.sample import COLORS, Picture, Sample, Turn
from deploy.demo_training.street import Street

READ = (
    "What does the sign say?",
    "What does the sign say?",
    "What does this sign say?",
    "Read the sign.",
    "Read the text.",
    "Read the text in the picture.",
    "What is written here?",
    "What is written on the sign?",
    "What text is in the picture?",
    "What does it say?",
    "What does the text say?",
    "Which text do you see?",
    "Can you read the sign?",
)
READ_LINE = (
    "What is the {place} line?",
    "What does the {place} line say?",
    "Read the {place} line.",
    "What is written in the {place} line?",
    "Which text is in the {place} line?",
    "What is on the {place} line of the sign?",
)
SIGN_COLOR = (
    "What color is the sign?",
    "Which color is the sign?",
    "What is the color of the sign?",
    "What colour is the sign?",
    "What color does the sign have?",
    "What is the sign's background color?",
)
TEXT_COLOR = (
    "What color is the text?",
    "Which color is the text?",
    "What is the color of the text?",
    "What colour is the text?",
    "What color are the letters?",
    "In what color is the text written?",
)
DESCRIBE = (
    "What is in the picture?",
    "Describe the picture.",
    "What do you see?",
    "What is this?",
    "What is in this image?",
    "Describe this image.",
    "What does the picture show?",
)
MAX_CHARS = 12  # of a line
# Tries to find texts and a face that fit; each asks for less than the one before.
ATTEMPTS = 8


def make_sign(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    """One picture of that size in pixels; from level 0.5 on some are shop fronts and price boards."""
    kind = rng.random()
    if level >= 0.5 and kind < 0.25 and min(size) >= 160:
        return _shop_front(rng, size, fonts, level)
    if level >= 0.5 and kind < 0.37:
        return _price_board(rng, size, fonts, level)
    return _plain_sign(rng, size, fonts, level)


def _plain_sign(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    block = _choose_block(rng, size, fonts, level)
    degrees = rng.uniform(-10, 10) * level if rng.random() < 0.5 * level else 0.0
    room = _room_around(block, rng)
    if rng.random() < 0.22:
        surface = random_rgb(rng)
        image = gradient(rng, size, surface, near(rng, surface, 14))
        panel_name, panel = None, surface
    else:
        image = background(rng, size, level)
        panel_name = rng.choice(COLORS) if rng.random() < 0.7 else None
        panel = random_rgb(rng) if panel_name is None else choose_rgb(rng, panel_name)
        surface = None
    board = Board(image, _place(rng, size, room, degrees), degrees)
    text_name, color = text_color(rng, panel)
    if surface is None:
        _draw_panel(rng, board, room, (panel, color), block.em)
    block.write(board, (0, 0), color, rng.choice(("center", "center", "left")))
    turns = _sign_turns(rng, block.lines, panel_name, text_name)
    return _finished(board, rng, level, turns)


def _choose_block(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> TextBlock:
    """Texts that fit into the picture at a legible size, and such a size."""
    num_lines = 1 if rng.random() < 0.65 or level < 0.15 else rng.choice((2, 2, 3))
    legibility = Legibility.of(size, fine=rng.random() < level / 3)
    longest = 3 + level * ((MAX_CHARS if rng.random() < 0.3 else 8) - 3)
    for attempt in range(ATTEMPTS):
        face = fonts.choose(rng)
        max_chars = max(1, round(longest * (1 - attempt / ATTEMPTS)))
        lines = tuple(words.text_to_read(rng, max_chars) for _ in range(num_lines))
        least = max(legibility.em(face, line) for line in lines)
        # A turned sign with its border still has to fit.
        most = fitting_em(face, lines, (size[0] * 0.74, size[1] * (0.6 if num_lines == 1 else 0.68)))
        if most >= least:
            # Large letters are the easy ones; at the highest level sizes are spread evenly by their ratio.
            share = rng.random() ** (0.4 + 0.6 * level)
            return TextBlock(lines, face, max(least, quantized(least * (most / least) ** share)))
        num_lines = max(1, num_lines - 1)
    raise ValueError(f"a picture of {size[0]}x{size[1]} pixels is too small for legible text")


def _room_around(block: TextBlock, rng: random.Random) -> tuple[float, float]:
    """Width and height of the text with its margins: letters with tails stay inside."""
    across, down = rng.uniform(0.35, 0.9), rng.uniform(0.7, 1.1)
    return block.width + across * block.em, block.height + down * block.em


def _place(
    rng: random.Random, size: tuple[int, int], room: tuple[float, float], degrees: float
) -> tuple[float, float]:
    """A centre that keeps a turned rectangle inside the picture where it fits at all."""
    tilt = abs(degrees) * 0.0175
    half_width, half_height = (room[0] + room[1] * tilt) / 2, (room[1] + room[0] * tilt) / 2
    return _within(rng, half_width, size[0]), _within(rng, half_height, size[1])


def _within(rng: random.Random, half: float, length: int) -> float:
    return rng.uniform(half, length - half) if 2 * half < length else length / 2


def _draw_panel(
    rng: random.Random, board: Board, room: tuple[float, float], colors: tuple[RGB, RGB], em: int
) -> None:
    """The sign without its text, of one colour and perhaps an edge of the other."""
    panel, edge = colors
    right, bottom = room[0] / 2, room[1] / 2
    # Rounder corners would cut into the text.
    radius = rng.choice((0.0, 0.0, 0.15, 0.3, 0.6)) * em
    style = rng.random()
    if style < 0.35:
        rim = rng.uniform(0.03, 0.08) * room[1]
        board.panel((-right - rim, -bottom - rim, right + rim, bottom + rim), edge, radius)
    elif style < 0.5:
        shade = room[1] * 0.06
        board.panel((-right + shade, -bottom + shade, right + shade, bottom + shade), (30, 30, 30), radius)
    board.panel((-right, -bottom, right, bottom), panel, radius)


def _sign_turns(
    rng: random.Random, lines: tuple[str, ...], panel: str | None, text: str | None
) -> tuple[Turn, ...]:
    whole = " ".join(lines)
    turns = [Turn("read", phrase(rng, READ), whole)]
    if len(lines) > 1 and rng.random() < 0.6:
        number = rng.randrange(len(lines))
        place = "last" if number == len(lines) - 1 else ("first", "second")[number]
        turns.append(Turn("read", phrase(rng, READ_LINE, place=place), lines[number]))
    other = rng.random()
    if other < 0.12 and panel is not None:
        turns.append(Turn("color", phrase(rng, SIGN_COLOR), panel))
    elif other < 0.24 and text is not None:
        turns.append(Turn("color", phrase(rng, TEXT_COLOR), text))
    elif other < 0.36:
        turns.append(Turn("describe", phrase(rng, DESCRIBE), _described(whole)))
    rng.shuffle(turns)
    return tuple(turns[:2])


def _described(text: str) -> str:
    return f'a sign that says "{text}"'


def _price_board(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    legibility = Legibility.of(size, fine=rng.random() < 0.33)
    menu = MenuBoard.compose(rng, fonts, legibility, rng.randint(2, 5))
    while menu.width > size[0] * 0.84 or menu.height > size[1] * 0.84:
        if len(menu.items) == 1:
            return _plain_sign(rng, size, fonts, level)
        menu = MenuBoard.compose(rng, fonts, legibility, len(menu.items) - 1)
    spare = min(size[0] * 0.84 / menu.width, size[1] * 0.84 / menu.height)
    menu = MenuBoard(
        menu.title, menu.items, menu.face, max(menu.em, quantized(menu.em * rng.uniform(1, spare)))
    )
    degrees = rng.uniform(-4, 4) if rng.random() < 0.4 else 0.0
    board = Board(background(rng, size, level), _place(rng, size, menu.room, degrees), degrees)
    draw_menu(rng, board, menu)
    first, second = menu.turn(rng), menu.turn(rng)
    title = menu.title_turn(rng)
    extra = title if rng.random() < 0.3 or second.answer == first.answer else second
    turns = (first, extra) if rng.random() < 0.6 else (first,)
    return _finished(board, rng, level, turns)


def _shop_front(rng: random.Random, size: tuple[int, int], fonts: FontShelf, level: float) -> Sample:
    street = Street(rng, size, fonts)
    sign, *others = street.draw()
    first = sign if not others or rng.random() < 0.6 else rng.choice(others)
    rest = [turn for turn in (sign, *others) if turn.answer != first.answer]
    turns = (first, rng.choice(rest)) if rest and rng.random() < 0.6 else (first,)
    return _finished(street.board, rng, level, turns)


def _finished(board: Board, rng: random.Random, level: float, turns: tuple[Turn, ...]) -> Sample:
    return Sample(turns, (Picture(photograph(board.image, rng, level), tuple(board.marks)),))
