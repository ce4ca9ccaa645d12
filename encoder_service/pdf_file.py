"""PDFs to pages as pictures, by PDFium.  Runs in a decoder process only: hostile files may end it.

Knows nothing about tiles and the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import BinaryIO

import numpy as np
import pypdfium2
import pypdfium2.raw

from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import StoredPart, Undecodable, check_size

CORRUPT = "the PDF is truncated or corrupt, or has no pages"
ENCRYPTED = "the PDF is encrypted; remove its password first"
_LOCKED = (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY)
POINTS_PER_INCH = 72
# Sharp enough for small print; most pages then fill the largest tilings, and more would only be scaled down.
# Inputs of the pixels that no request can change: other values are another content.
PAGE_DPI = 144
MAX_PAGE_SIDE = 2048

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def open_document(file: BinaryIO, limits: ContainerLimits) -> list[StoredPart]:
    """All pages with the sizes at which they will be rendered; none is.

    Raises:
        Undecodable: corrupt, encrypted, without pages, or beyond a limit.
    """
    with _opened(file) as document:
        num_pages = len(document)
        if num_pages == 0:
            raise Undecodable(CORRUPT)
        if num_pages > limits.max_pages:
            raise Undecodable(f"the PDF has {num_pages} pages; at most {limits.max_pages} are accepted")
        pages = []
        for number in range(num_pages):
            width, height = _rendered_size(document.get_page_size(number))
            check_size(f"page {number + 1}", width, height, limits)
            pages.append(StoredPart(width, height, 0.0, (number,)))
    return pages


def read_pages(file: BinaryIO, parts: Sequence[StoredPart]) -> Iterator[Pixels]:
    """[height, width, 3] of each part, filled-in forms included.

    Raises:
        Undecodable: a page is corrupt.
    """
    with _opened(file) as document:
        if document.get_formtype() != pypdfium2.raw.FORMTYPE_NONE:
            document.init_forms()
        for part in parts:
            with closing(document.get_page(part.place[0])) as page:
                scale = _scale(page.get_size())
                with closing(page.render(scale=scale, rev_byteorder=True, prefer_bgrx=True)) as bitmap:
                    yield bitmap.to_numpy()[:, :, :3]


@contextmanager
def _opened(file: BinaryIO) -> Iterator[pypdfium2.PdfDocument]:
    """PDFium's errors are the file's fault; their text stays here."""
    file.seek(0)
    data = file.read()
    try:
        with closing(pypdfium2.PdfDocument(data)) as document:
            yield document
    except pypdfium2.PdfiumError as error:
        # Its error code may still be that of the document before.
        is_locked = error.err_code in _LOCKED and b"/Encrypt" in data
        raise Undecodable(ENCRYPTED if is_locked else CORRUPT) from error


def _scale(size: tuple[float, float]) -> float:
    """Pixels of a point."""
    longer = max(size)
    if not 0 < longer < math.inf:
        raise Undecodable("a page of the PDF has no size")
    return min(PAGE_DPI / POINTS_PER_INCH, MAX_PAGE_SIDE / longer)


def _rendered_size(size: tuple[float, float]) -> tuple[int, int]:
    """As PdfPage.render rounds it."""
    scale = _scale(size)
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)
