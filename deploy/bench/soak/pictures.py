"""The pictures that clients send: one whose answers are known, some that come again, and new ones."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

from PIL import Image

NUM_REPEATED = 8
CELL = 24  # pixels of the noise that is blown up to a picture
SIDES = (64, 224, 300, 448, 640)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class Pictures:
    """Content parts of chat messages."""

    def __init__(self, known: Path, seed: int) -> None:
        rng = random.Random(seed)
        self.known_bytes = known.read_bytes()
        self.known = image_part(self.known_bytes, "JPEG")
        self._repeated = [new_picture(rng) for _ in range(NUM_REPEATED)]

    def repeated(self, rng: random.Random) -> dict[str, Any]:
        return rng.choice(self._repeated)


def new_picture(rng: random.Random) -> dict[str, Any]:
    """One that no cache has."""
    file, kind = io.BytesIO(), rng.choice(FORMATS)
    _draw(rng).save(file, kind)
    return image_part(file.getvalue(), kind)


def new_document(rng: random.Random) -> dict[str, Any]:
    """A PDF of one or two pages."""
    file = io.BytesIO()
    pages = [_draw(rng) for _ in range(rng.randint(1, 2))]
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{data}", "filename": "a.pdf"}}


def image_part(data: bytes, kind: str) -> dict[str, Any]:
    uri = f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def _draw(rng: random.Random) -> Image.Image:
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    columns, rows = width // CELL + 1, height // CELL + 1
    noise = Image.frombytes("RGB", (columns, rows), rng.randbytes(3 * columns * rows))
    return noise.resize((width, height), Image.Resampling.BILINEAR)
