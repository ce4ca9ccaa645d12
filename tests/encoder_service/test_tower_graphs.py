from __future__ import annotations

import pytest

from encoder_service.tower_graphs import ladder


@pytest.mark.parametrize("max_tiles", [1, 6, 16, 32, 33, 60])
def test_the_ladder_rises_to_exactly_the_most_tiles(max_tiles: int) -> None:
    sizes = ladder(max_tiles)
    assert sizes[0] == 1 and sizes[-1] == max_tiles
    assert sizes == sorted(set(sizes))


def test_usual_layouts_are_computed_without_padding() -> None:
    """Tiles of 1344x896, 1024x1024 and 4:3 pictures, and four of the first."""
    assert {1, 7, 10, 13, 28} <= set(ladder(32))


def test_padding_is_bounded() -> None:
    sizes = ladder(64)
    assert max(high - low for low, high in zip(sizes, sizes[1:], strict=False)) <= 8
