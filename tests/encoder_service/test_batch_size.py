"""How many tiles a forward takes, by what forwards of several sizes take."""

import pytest

from encoder_service.batch_size import BatchSizes, choose_batch_sizes, resolve_batch_sizes

# An H200's milliseconds a tile, launch by launch; of the large tower some are made up.
SMALL_TOWER = {1: 4.301, 2: 2.760, 4: 1.591, 8: 1.458, 16: 1.429, 32: 1.462}
LARGE_TOWER = {1: 20.43, 2: 20.42, 4: 20.41}


class Tower:
    def __init__(self, tile_ms: dict[int, float]) -> None:
        self.tile_ms = tile_ms
        self.measured: list[int] = []

    def forward_s(self, num_tiles: int) -> float:
        self.measured.append(num_tiles)
        return self.tile_ms[num_tiles] * num_tiles


@pytest.mark.parametrize(
    ("tile_ms", "limit", "sizes"),
    [
        (SMALL_TOWER, 32, BatchSizes(4, 16)),
        (SMALL_TOWER, 4, BatchSizes(4, 4)),
        (SMALL_TOWER, 1, BatchSizes(1, 1)),
        (LARGE_TOWER, 32, BatchSizes(1, 1)),
        ({**SMALL_TOWER, 6: 1.5}, 6, BatchSizes(4, 6)),
    ],
)
def test_a_batch_grows_while_that_makes_a_tile_cheaper(tile_ms, limit, sizes):
    assert choose_batch_sizes(Tower(tile_ms).forward_s, limit) == sizes


def test_no_size_is_measured_twice_and_none_beyond_what_helps():
    small, large = Tower(SMALL_TOWER), Tower(LARGE_TOWER)
    choose_batch_sizes(small.forward_s, 32)
    choose_batch_sizes(large.forward_s, 32)
    assert sorted(small.measured) == [1, 2, 4, 8, 16, 32]
    assert sorted(large.measured) == [1, 2]


@pytest.mark.parametrize(
    ("first", "most", "sizes"),
    [(0, 0, (4, 16)), (3, 0, (3, 16)), (0, 8, (4, 8)), (0, 2, (2, 2)), (64, 0, (16, 16))],
)
def test_only_what_is_not_set_is_measured(first, most, sizes):
    assert resolve_batch_sizes(first, most, 32, Tower(SMALL_TOWER).forward_s) == BatchSizes(*sizes)


def test_what_is_set_needs_no_measurement():
    tower = Tower(SMALL_TOWER)
    assert resolve_batch_sizes(5, 16, 32, tower.forward_s) == BatchSizes(5, 16)
    assert not tower.measured
