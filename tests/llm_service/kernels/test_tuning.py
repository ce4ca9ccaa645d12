"""What was measured becomes a table in Python that reads back as it was."""

from llm_service.kernels import table_bf16
from llm_service.kernels.cases import Case
from llm_service.kernels.linear_config import GemvConfig, TileConfig
from llm_service.kernels.tuning import Tuned, source

GEMV, TILE = GemvConfig(4, 512, 2), TileConfig(64, 128, 4, 4, 2)


def test_the_written_table_reads_back_as_it_was():
    tables = [{}, {(1, 64, 128): GEMV}, {(16, 64, 128): TILE, (1, 64, 128): GEMV, (4, 64, 128): None}]
    for table in (*tables, table_bf16.TABLE):
        found = {}
        exec(source(table, float8=False), found)
        assert found["TABLE"] == table


def test_its_lines_are_no_longer_than_the_formatter_allows():
    text = source({(64, 151680, 18944): TileConfig(128, 256, 16, 10, 16)}, float8=True)
    assert max(map(len, text.splitlines())) <= 110


def test_the_fastest_is_chosen_but_few_rows_are_never_rounded_to_float8():
    results = [(3.0, None), (4.0, TILE), (5.0, GEMV)]
    assert Tuned(Case(1, 64, 128, False, float8=True), results).best == TILE
    assert Tuned(Case(64, 64, 128, False, float8=True), results).best is None
    assert Tuned(Case(1, 64, 128, False, float8=False), results).best is None
