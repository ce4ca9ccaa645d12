"""Pictures of a request at one encoder: how the credit is divided, and what counts as load."""

from __future__ import annotations

import pytest

from llm_service.config import EncoderPoolConfig
from llm_service.encoder_pool import EncoderConnection
from llm_service.encoding_part import EncodingPart, shares
from tests.llm_service.scripted_encoder import FixedBase, make_picture


@pytest.fixture
async def connection() -> EncoderConnection:
    return EncoderConnection("127.0.0.1:1", EncoderPoolConfig(), FixedBase())  # type: ignore[arg-type]


def part_of(connection: EncoderConnection, num_pictures: int) -> EncodingPart:
    part = EncodingPart(connection, lambda: True)
    for medium in range(num_pictures):
        part.add(medium, make_picture(b"%d" % medium), num_tiles=3)
    return part


@pytest.mark.parametrize(
    ("total", "pictures", "expected"),
    [
        (16, [1], [16]),
        (16, [1, 1], [8, 8]),
        (16, [1, 3], [4, 12]),
        (3, [1, 1], [2, 1]),
        (1, [2, 1, 1], [1, 0, 0]),
        (0, [1, 2], [0, 0]),
    ],
)
async def test_a_credit_is_divided_by_pictures_and_no_tile_of_it_is_lost(
    connection: EncoderConnection, total: int, pictures: list[int], expected: list[int]
) -> None:
    parts = [part_of(connection, count) for count in pictures]
    assert shares(total, parts) == expected
    await connection.close()


async def test_what_is_expected_is_the_encoders_load_until_it_is_closed(
    connection: EncoderConnection,
) -> None:
    part, other = part_of(connection, 2), part_of(connection, 1)
    assert connection.load.own == 9
    part.expect(4)
    assert connection.load.own == 7
    part.close()
    part.close()
    assert connection.load.own == 3
    other.half_close()
    assert connection.load.own == 0
    await connection.close()
