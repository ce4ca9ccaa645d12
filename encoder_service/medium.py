"""A medium as the encoder sees it once headers are read: parts, their tiles, and what is decoded together.

Knows nothing about file formats and processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from encoder_service.decode_job import StoredPart
from encoder_service.tiling import TilePlan
from protos.media import MediaKind

# Decoded parts of one video or document at a time: enough that a key frame is not decoded for each of them.
SECTION_BYTES = 32 << 20
# Per pixel: the shared memory of the decoder process beside Pillow's picture.
SHARED_BYTES, PICTURE_BYTES = 3, 4


@dataclass(frozen=True)
class Part:
    """What is cut into tiles by itself: a picture, a frame of a video or a page of a document."""

    width: int  # pixels, upright
    height: int  # pixels, upright
    plan: TilePlan
    stored: StoredPart | None = None  # where a video or document has it


@dataclass(frozen=True)
class Section:
    """Neighbouring parts that are decoded together."""

    first_tile: int
    parts: tuple[Part, ...]
    decode_bytes: int  # most memory while they are decoded

    @property
    def num_tiles(self) -> int:
        return sum(part.plan.num_tiles for part in self.parts)


@dataclass(frozen=True)
class Medium:
    """A medium of which only headers have been read.  Its tiles are those of its sections, in order."""

    kind: MediaKind
    format: str  # of a video or document: what a decoder process takes it for
    data: bytes
    content_hash: bytes
    sections: tuple[Section, ...]

    @classmethod
    def picture(cls, data: bytes, content_hash: bytes, part: Part, decode_bytes: int) -> Medium:
        return cls(MediaKind.IMAGE, "", data, content_hash, (Section(0, (part,), decode_bytes),))

    @classmethod
    def container(
        cls, kind: MediaKind, format: str, data: bytes, content_hash: bytes, parts: Sequence[Part]
    ) -> Medium:
        """A video or document with these frames or pages."""
        return cls(kind, format, data, content_hash, tuple(_sections(parts)))

    @property
    def parts(self) -> list[Part]:
        return [part for section in self.sections for part in section.parts]

    @cached_property
    def num_tiles(self) -> int:
        return sum(section.num_tiles for section in self.sections)

    @cached_property
    def _first_tiles(self) -> list[int]:
        return [section.first_tile for section in self.sections]

    def section_of(self, tile: int) -> int:
        """The section that holds the tile."""
        return bisect_right(self._first_tiles, tile) - 1


def _sections(parts: Sequence[Part]) -> Iterator[Section]:
    first_tile = 0
    together: list[Part] = []
    for part in parts:
        if together and _num_pixels((*together, part)) * PICTURE_BYTES > SECTION_BYTES:
            yield _section(first_tile, together)
            first_tile += sum(part.plan.num_tiles for part in together)
            together = []
        together.append(part)
    yield _section(first_tile, together)


def _section(first_tile: int, parts: Sequence[Part]) -> Section:
    return Section(first_tile, tuple(parts), _num_pixels(parts) * (SHARED_BYTES + PICTURE_BYTES))


def _num_pixels(parts: Sequence[Part]) -> int:
    return sum(part.width * part.height for part in parts)
