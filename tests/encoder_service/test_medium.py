"""Which parts of a video or document are decoded together."""

from __future__ import annotations

from encoder_service.decode_job import StoredPart
from encoder_service.medium import PICTURE_BYTES, SECTION_BYTES, SHARED_BYTES, Medium, Part
from encoder_service.tiling import TilePlan
from protos.media import MediaKind

WHOLE = TilePlan(1, 1, has_thumbnail=False)
SPLIT = TilePlan(2, 1, has_thumbnail=True)


def medium(*parts: tuple[int, int, TilePlan]) -> Medium:
    made = [Part(width, height, plan, StoredPart(width, height, 0, ())) for width, height, plan in parts]
    return Medium.container(MediaKind.VIDEO, "mov", b"", b"", made)


def test_small_parts_share_a_section_and_large_ones_have_their_own() -> None:
    side = int((SECTION_BYTES / PICTURE_BYTES) ** 0.5)
    small, large = (side // 4, side // 4, WHOLE), (side, side, SPLIT)
    made = medium(*[small] * 20, large, large, small)
    assert [len(section.parts) for section in made.sections] == [16, 4, 1, 1, 1]
    assert [section.first_tile for section in made.sections] == [0, 16, 20, 23, 26]
    assert made.num_tiles == 27
    assert [made.section_of(tile) for tile in (0, 15, 16, 19, 20, 22, 23, 25, 26)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]
    assert made.sections[2].decode_bytes == side * side * (SHARED_BYTES + PICTURE_BYTES)


def test_a_part_larger_than_a_section_is_one() -> None:
    made = medium((10_000, 10_000, WHOLE), (10_000, 10_000, WHOLE))
    assert [len(section.parts) for section in made.sections] == [1, 1]


def test_a_picture_is_one_section() -> None:
    made = Medium.picture(b"png", b"hash", Part(10, 20, SPLIT), 77)
    assert made.num_tiles == 3 and made.section_of(2) == 0
    assert [section.decode_bytes for section in made.sections] == [77]
