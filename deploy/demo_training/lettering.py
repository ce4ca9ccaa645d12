"""Writes lines of text on a picture, upright or turned, and says where each character came to lie.

Also says how small text may be for a model that sees the picture in tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, ImageDraw

from deploy.demo_training.colors import RGB
from deploy.demo_training.fonts import FontFace, quantized
from deploy.demo_training.sample import Mark
from encoder_service.tiling import TilingOptions, choose_grid

TILE = 224
TILING = TilingOptions(min_tiles=1, max_tiles=6, use_thumbnail=True)
LINE_PITCH = 1.3  # baseline to baseline, in ems
CORNER_STEPS = 4  # straight pieces that a rounded corner of a turned panel is made of

Align = Literal["left", "center", "right"]


@dataclass(frozen=True)
class Legibility:
    """The least size of text in one picture, in its own pixels."""

    cap_height: float
    advance: float  # mean width of the characters of a line

    @classmethod
    def of(cls, size: tuple[int, int], fine: bool = False) -> Legibility:
        """For reading from the thumbnail alone or, `fine`, from the tiles as well."""
        columns, rows = tile_grid(size)
        if fine and columns * rows > 1:
            return cls(9 * size[1] / (rows * TILE), 5.5 * size[0] / (columns * TILE))
        return cls(10 * size[1] / TILE, 7 * size[0] / TILE)

    def em(self, face: FontFace, text: str) -> int:
        """The least em, in pixels, at which `text` set in `face` can be read."""
        return math.ceil(max(self.cap_height / face.cap_height, self.advance * len(text) / face.width(text)))


@dataclass(frozen=True)
class Board:
    """A plane in front of the picture, turned about its centre; places on it are pixels from there."""

    image: Image.Image
    centre: tuple[float, float]
    degrees: float = 0.0  # counterclockwise
    marks: list[Mark] = field(default_factory=list)  # of everything written so far

    def at(self, right: float, down: float) -> tuple[float, float]:
        """Where a place on the board is in the picture, in pixels."""
        cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        return self.centre[0] + right * cosine + down * sine, self.centre[1] - right * sine + down * cosine

    def panel(self, box: tuple[float, float, float, float], color: RGB, radius: float = 0.0) -> None:
        """Fills the rectangle left, top, right, bottom, its corners rounded by `radius`."""
        draw = ImageDraw.Draw(self.image)
        if self.degrees:
            draw.polygon([self.at(*corner) for corner in _outline(box, radius)], fill=color)
            return
        (left, top), (right, bottom) = self.at(box[0], box[1]), self.at(box[2], box[3])
        draw.rounded_rectangle((left, top, max(left, right), max(top, bottom)), radius, fill=color)

    def write(
        self,
        text: str,
        face: FontFace,
        em: int,
        place: tuple[float, float],
        color: RGB,
        align: Align = "center",
    ) -> None:
        """One line; `place` is its left end, middle or right end, halfway up its capitals."""
        font = face.at(em)
        width = font.getlength(text)
        offset = place[0] + width * {"left": 0.5, "center": 0.0, "right": -0.5}[align]
        half_cap = face.cap_height * em / 2
        if self.degrees:
            self._write_turned(text, face, em, (offset, place[1]), color)
        else:
            middle = self.at(offset, place[1])
            draw = ImageDraw.Draw(self.image)
            draw.text((middle[0] - width / 2, middle[1] + half_cap), text, fill=color, font=font, anchor="ls")
        self._mark(text, face, em, width, (offset - width / 2, place[1] + half_cap))

    def _write_turned(
        self, text: str, face: FontFace, em: int, place: tuple[float, float], color: RGB
    ) -> None:
        font = face.at(em)
        width, cap = font.getlength(text), face.cap_height * em
        # Room on all sides for what reaches over the line's box: accents, tails and slanted ends.
        ink = Image.new("L", (2 * math.ceil(width / 2 + em / 2), 2 * math.ceil(cap / 2 + em / 2)))
        start = (ink.width - width) / 2, (ink.height + cap) / 2
        ImageDraw.Draw(ink).text(start, text, fill=255, font=font, anchor="ls")
        ink = ink.rotate(self.degrees, Image.Resampling.BILINEAR, expand=True)
        x, y = self.at(*place)
        self.image.paste(color, (round(x - ink.width / 2), round(y - ink.height / 2)), ink)

    def _mark(self, text: str, face: FontFace, em: int, width: float, start: tuple[float, float]) -> None:
        """Adds the centre of each character's ink; what kerning took or gave is spread over the line."""
        stretch = width / (face.width(text) * em)
        right = start[0]
        for character in text:
            glyph = face.glyph(character)
            if character != " ":
                across = right + (glyph.left + glyph.right) / 2 * em * stretch
                x, y = self.at(across, start[1] + (glyph.top + glyph.bottom) / 2 * em)
                self.marks.append(Mark(character, x / self.image.width, y / self.image.height))
            right += glyph.advance * em * stretch


@dataclass(frozen=True)
class TextBlock:
    """Lines of one face and size, one below the other."""

    lines: tuple[str, ...]
    face: FontFace
    em: int

    @property
    def width(self) -> float:
        return max(self.face.width(line) for line in self.lines) * self.em

    @property
    def height(self) -> float:
        """From the top of the first line's capitals to the last baseline."""
        return (len(self.lines) - 1) * LINE_PITCH * self.em + self.face.cap_height * self.em

    def write(self, board: Board, centre: tuple[float, float], color: RGB, align: Align = "center") -> None:
        across = centre[0] + self.width * {"left": -0.5, "center": 0.0, "right": 0.5}[align]
        down = centre[1] - (len(self.lines) - 1) * LINE_PITCH * self.em / 2
        for number, line in enumerate(self.lines):
            place = (across, down + number * LINE_PITCH * self.em)
            board.write(line, self.face, self.em, place, color, align)


def fitting_em(face: FontFace, lines: tuple[str, ...], room: tuple[float, float]) -> int:
    """The largest em at which the lines fit into a width and a height in pixels."""
    widest = max(face.width(line) for line in lines)
    height = (len(lines) - 1) * LINE_PITCH + face.cap_height
    return quantized(min(room[0] / widest, room[1] / height))


def tile_grid(size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of the tiles that the model cuts a picture of that size into."""
    return choose_grid(size[0], size[1], TILING, TILE)


def _outline(box: tuple[float, float, float, float], radius: float) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    if radius <= 0:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    radius = min(radius, (right - left) / 2, (bottom - top) / 2)
    corners = ((right, top, 90), (left, top, 180), (left, bottom, 270), (right, bottom, 0))
    points = []
    for x, y, start in corners:
        middle_x, middle_y = x + (radius if x == left else -radius), y + (radius if y == top else -radius)
        for step in range(CORNER_STEPS + 1):
            # Counterclockwise as seen: from the right edge over the top to the left, then along the bottom.
            angle = math.radians(start - 90 + 90 * step / CORNER_STEPS)
            points.append((middle_x + radius * math.cos(angle), middle_y - radius * math.sin(angle)))
    return points
