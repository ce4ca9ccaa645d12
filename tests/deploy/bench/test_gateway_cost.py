"""The gateway's cost is measured through the real gateway, and disconnects through the real engine."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from deploy.bench import gateway_cost
from deploy.bench.disconnect import Disconnects, Drop
from deploy.bench.front_end_load import LoadResult
from deploy.bench.gateway_cost import Cost, GatewayStack


def test_all_four_are_printed_beside_what_is_promised(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway_cost.run(
        checkpoint, streams=4, requests=1, max_tokens=16, step_s=0.005, pictures=2, disconnects=1
    )
    printed = capsys.readouterr().out
    for promised in ("<= 75 us", "<= 25 us", "<= 1.5 ms", "<= 50 ms"):
        assert promised in printed
    assert "bare Starlette route" in printed and "longest step" in printed


def test_every_token_is_counted_whether_it_comes_alone_or_with_others() -> None:
    with closing(GatewayStack()) as stack:
        single = stack.stream(3, 2, 0.005, 1, 16)
        joined = stack.stream(3, 2, 0.005, 4, 16)
    assert single.load.tokens == joined.load.tokens == 3 * 2 * 16
    assert joined.load.chunks <= joined.load.tokens // 4
    assert joined.load.chunks < single.load.chunks <= single.load.tokens


def test_cost_is_cpu_time_by_events_and_by_tokens() -> None:
    load = LoadResult(400, 100, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1)
    cost = Cost(load, gateway_s=0.004)
    assert (cost.event_us, cost.token_us) == (pytest.approx(40), pytest.approx(10))


def test_the_slowest_disconnect_counts() -> None:
    found = Disconnects([Drop(3.0, 1.0), Drop(9.0, 1.0)], [Drop(4.0, 2.0)])
    assert found.most_ms == 9.0
