"""Pictures for tests: small, distinct, made on the spot."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 120, height: int = 90) -> bytes:
    """A PNG of smooth colour noise; every seed gives another one."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64," + base64.b64encode(data).decode()


def image_part(data: bytes, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(data), **options}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*content: Any) -> list[dict[str, Any]]:
    """A conversation of one user message."""
    return [{"role": "user", "content": list(content)}]
