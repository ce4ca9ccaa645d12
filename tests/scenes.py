"""Pictures with known content for the demo model: signs, coloured things, a receipt, a clip. PNG files.

Drawn with Pillow and its embedded font alone; owes nothing to the generator that trained the model.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Size = tuple[int, int]  # width, height in pixels
Point = tuple[float, float]

# Sizes that are cut into so many tiles of 224 x 224, the thumbnail included.
TILED: dict[int, Size] = {1: (280, 224), 3: (480, 240), 5: (460, 450), 7: (672, 448)}
INKS = {
    "red": "#e01818",
    "green": "#18a030",
    "blue": "#1850e8",
    "yellow": "#ffe010",
    "orange": "#ff8c10",
    "purple": "#8020a0",
    "black": "#101010",
    "white": "#ffffff",
}
WALL = "#d9d4c5"
PLACES: dict[str, Point] = {  # centres in shares of the picture's width and height
    "top left": (0.18, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.82, 0.2),
    "left": (0.18, 0.5),
    "center": (0.5, 0.5),
    "right": (0.82, 0.5),
    "bottom left": (0.18, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.82, 0.8),
}


def sign(
    text: str, size: Size = TILED[1], board: str = "white", ink: str = "black", share: float = 0.88
) -> bytes:
    """A framed board on a wall that says `text`, in lines of equal height.

    `share` is the board's part of the picture's width; its height shrinks with it.
    """
    image = Image.new("RGB", size, WALL)
    draw = ImageDraw.Draw(image)
    width, height = size
    right, below = share / 2 * width, share / 2.44 * height
    edges = (width / 2 - right, height / 2 - below, width / 2 + right, height / 2 + below)
    draw.rectangle(edges, INKS[board], INKS[ink], max(2, height // 60))
    lines = text.split("\n")
    em = min(_em(line, 1.68 * right) for line in lines)
    em = min(em, 1.56 * below / len(lines))
    for index, line in enumerate(lines):
        down = height / 2 + (index - (len(lines) - 1) / 2) * 1.2 * em
        draw.text((width / 2, down), line, INKS[ink], ImageFont.load_default(em), anchor="mm")
    return _png(image)


def things(placed: dict[str, str], size: Size = TILED[1], diameter: float = 0.26) -> bytes:
    """Things such as "red circle" at PLACES; `diameter` is a share of the shorter side."""
    image = Image.new("RGB", size, "white")
    for place, thing in placed.items():
        across, down = PLACES[place]
        _draw_thing(image, thing, (across * size[0], down * size[1]), diameter * min(size))
    return _png(image)


def receipt(shop: str, rows: Sequence[tuple[str, str]], size: Size = (280, 260)) -> bytes:
    """White paper: the shop's name, then a word and an amount in each row, a rule above the last one."""
    image = Image.new("RGB", size, "#8a8f98")
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.rectangle((0.08 * width, 0.05 * height, 0.92 * width, 0.95 * height), "white")
    pitch = 0.86 * height / (len(rows) + 1.4)
    font = ImageFont.load_default(0.62 * pitch)
    down = 0.07 * height + 0.6 * pitch
    draw.text((width / 2, down), shop, INKS["black"], font, anchor="mm")
    down += 1.3 * pitch
    for word, amount in rows:
        if (word, amount) == rows[-1]:
            draw.line((0.13 * width, down - pitch / 2, 0.87 * width, down - pitch / 2), INKS["black"], 2)
        draw.text((0.13 * width, down), word, INKS["black"], font, anchor="lm")
        draw.text((0.87 * width, down), amount, INKS["black"], font, anchor="rm")
        down += pitch
    return _png(image)


def clip(thing: str, direction: str, num_frames: int = 4, size: Size = (240, 200)) -> list[bytes]:
    """Frames of a thing that crosses the picture "left", "right", "up" or "down"."""
    step_x, step_y = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[direction]
    frames = []
    for number in range(num_frames):
        way = 0.54 * (number / (num_frames - 1) - 0.5)  # share of the side behind (or before) the centre
        image = Image.new("RGB", size, "white")
        center = ((0.5 + step_x * way) * size[0], (0.5 + step_y * way) * size[1])
        _draw_thing(image, thing, center, 0.24 * min(size))
        frames.append(_png(image))
    return frames


def _em(line: str, width: float) -> float:
    """The font size at which `line` is so many pixels wide."""
    return 100 * width / ImageFont.load_default(100).getlength(line)


def _draw_thing(image: Image.Image, thing: str, center: Point, diameter: float) -> None:
    color, shape = thing.split()
    radius = diameter / 2
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.circle(center, radius, INKS[color])
        return
    points = [(center[0] + radius * x, center[1] + radius * y) for x, y in _outline(shape)]
    draw.polygon(points, INKS[color])


def _outline(shape: str) -> list[Point]:
    """Corners around (0, 0) for a radius of 1, y pointing down."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [_spoke(1.1, corner / 3) for corner in range(3)]
    assert shape == "star", shape
    return [_spoke(0.46 if corner % 2 else 1.1, corner / 10) for corner in range(10)]


def _spoke(length: float, turn: float) -> Point:
    """The end of a line of that length, `turn` rounds clockwise from straight up."""
    return length * math.sin(2 * math.pi * turn), -length * math.cos(2 * math.pi * turn)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
