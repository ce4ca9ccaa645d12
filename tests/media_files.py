"""Small videos and PDFs for tests, made when they are needed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

# A machine lent for its GPU has not all of the encoder's packages; these tests do not need the GPU.
av = pytest.importorskip("av")


def video(
    frames: Sequence[bytes | Image.Image],
    fps: int = 8,
    format: str = "mp4",
    codec: str = "h264",
    turned: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """A file of these frames; `turned` are the degrees by which a player turns them counter-clockwise."""
    images = [frame if isinstance(frame, Image.Image) else Image.open(io.BytesIO(frame)) for frame in frames]
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 without a picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def numbered_frames(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Grey frames, each brighter than the last: `brightness_of` tells which one it is."""
    return [Image.new("RGB", size, (number_to_grey(number, count),) * 3) for number in range(count)]


def number_to_grey(number: int, count: int) -> int:
    return 20 + 215 * number // max(count - 1, 1)


def pdf(pages: Sequence[bytes | Image.Image], dpi: float = 72) -> bytes:
    """A PDF with a page for each picture."""
    images = [page if isinstance(page, Image.Image) else Image.open(io.BytesIO(page)) for page in pages]
    first, *others = (image.convert("RGB") for image in images)
    file = io.BytesIO()
    first.save(file, "PDF", save_all=True, append_images=others, resolution=dpi, quality=95)
    return file.getvalue()


def bare_pdf(media_box: str = "[0 0 200 100]", num_pages: int = 1, trailer: str = "") -> bytes:
    """A hand-written PDF of empty pages, whose boxes and trailer may be anything."""
    kids = " ".join(f"{number} 0 R" for number in range(3, 3 + num_pages))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {num_pages} >>",
        *[f"<< /Type /Page /Parent 2 0 R /MediaBox {media_box} >>"] * num_pages,
    ]
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    entries = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    table = f"xref\n0 {size}\n0000000000 65535 f \n{entries}"
    end = f"trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + table.encode() + end.encode()


# The standard handler, with a password that nobody knows.
LOCK = (
    f"/Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> "
    f"/ID [<{'33' * 16}> <{'33' * 16}>]"
)
