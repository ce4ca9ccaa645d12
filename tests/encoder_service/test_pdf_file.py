"""Pages of real PDFs: sizes from their boxes, pixels, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import Undecodable
from encoder_service.pdf_file import CORRUPT, ENCRYPTED, MAX_PAGE_SIDE, open_document, read_pages
from tests.media_files import LOCK, bare_pdf, pdf

LIMITS = ContainerLimits()
RED, TALL_BLUE = Image.new("RGB", (280, 224), "red"), Image.new("RGB", (100, 3000), "blue")


def test_pages_have_their_sizes_at_144_dpi_within_a_bound() -> None:
    first, second = open_document(io.BytesIO(pdf([RED, TALL_BLUE])), LIMITS)
    assert (first.width, first.height) == (560, 448)
    assert (second.width, second.height) == (69, MAX_PAGE_SIDE)


def test_pages_are_rendered_at_these_sizes_in_any_order() -> None:
    data = pdf([RED, TALL_BLUE])
    parts = open_document(io.BytesIO(data), LIMITS)
    blue, red = read_pages(io.BytesIO(data), parts[::-1])
    assert (blue.shape, red.shape) == ((MAX_PAGE_SIDE, 69, 3), (448, 560, 3))
    assert np.abs(red.mean((0, 1)) - (255, 0, 0)).max() < 3
    assert np.abs(blue.mean((0, 1)) - (0, 0, 255)).max() < 3


def test_an_empty_page_is_white() -> None:
    data = bare_pdf()
    [page] = read_pages(io.BytesIO(data), open_document(io.BytesIO(data), LIMITS))
    assert page.shape == (200, 400, 3) and page.min() == 255


def test_an_enormous_page_is_rendered_small() -> None:
    [part] = open_document(io.BytesIO(bare_pdf("[0 0 9000000 4500000]")), LIMITS)
    assert (part.width, part.height) == (MAX_PAGE_SIDE, MAX_PAGE_SIDE // 2)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"%PDF-1.4 and nothing else", CORRUPT),
        (bare_pdf(trailer=LOCK), ENCRYPTED),
        (bare_pdf(num_pages=0), CORRUPT),
        (bare_pdf("[0 0 4000 3]"), "page 1 is 2048 x 2 pixels: the longer side may be at most 200 times"),
    ],
)
def test_what_cannot_be_opened_is_named(data: bytes, problem: str) -> None:
    with pytest.raises(Undecodable) as caught:
        open_document(io.BytesIO(data), LIMITS)
    assert str(caught.value).startswith(problem)


def test_too_many_pages_and_pixels_are_refused_from_headers() -> None:
    with pytest.raises(Undecodable, match="the PDF has 3 pages; at most 2 are accepted"):
        open_document(io.BytesIO(bare_pdf(num_pages=3)), ContainerLimits(max_pages=2))
    with pytest.raises(Undecodable, match="page 1 is 400 x 200 pixels: at most 79999 pixels are decoded"):
        open_document(io.BytesIO(bare_pdf()), ContainerLimits(max_part_pixels=79_999))
