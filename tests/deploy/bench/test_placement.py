"""The simulation agrees with what the policies are for, on a short trace."""

from __future__ import annotations

import statistics

import pytest

from deploy.bench import placement
from deploy.bench.placement import Outcome, answer, encode, policies
from deploy.bench.placement_trace import CONTINUES, make_trace
from gateway.llm_client import FREE_SEQUENCES
from llm_service.encoder_pool import FREE_TILES
from protos.placement import MAX_LOAD_RATIO

BOUNDED = f"rendezvous, load <= {MAX_LOAD_RATIO} of mean"


def outcomes(run: object, per_s: float, duration_s: float, free: float) -> dict[str, Outcome]:
    trace = make_trace(per_s, duration_s)
    assert callable(run)
    return {name: run(trace, make_policy, 4) for name, make_policy in policies(free).items()}


@pytest.fixture(scope="module")
def of_encoders() -> dict[str, Outcome]:
    return outcomes(encode, 150, 60, FREE_TILES)


@pytest.fixture(scope="module")
def of_language_models() -> dict[str, Outcome]:
    return outcomes(answer, 6, 900, FREE_SEQUENCES)


def test_the_trace_has_the_shape_that_it_says() -> None:
    trace = make_trace(5, 3600)
    assert make_trace(5, 3600) == trace and make_trace(5, 3600, seed=1) != trace
    times = [request.time_s for request in trace]
    assert times == sorted(times) and 16_000 < len(trace) < 20_000
    further = [request for request in trace if request.known_tokens]
    assert abs(len(further) / len(trace) - CONTINUES) < 0.03
    assert all(request.known_tokens <= request.prompt_tokens for request in trace)
    assert 9_000 < statistics.mean(request.prompt_tokens for request in trace) < 13_000
    firsts = sorted({request.key: request.time_s for request in reversed(trace)}.values())
    gaps = [late - early for early, late in zip(firsts, firsts[1:], strict=False)]
    assert 1.8 < statistics.stdev(gaps) / statistics.mean(gaps) < 2.2


def test_affinity_finds_caches(
    of_encoders: dict[str, Outcome], of_language_models: dict[str, Outcome]
) -> None:
    for found in (of_encoders, of_language_models):
        assert found["rendezvous"].hit_rate > 1.2 * found["round robin"].hit_rate
        assert found["round robin"].hit_rate < found[BOUNDED].hit_rate < found["rendezvous"].hit_rate


def test_some_free_load_keeps_affinity_where_the_bound_alone_loses_it(
    of_language_models: dict[str, Outcome],
) -> None:
    *_, bounded, free = of_language_models.values()
    assert free.hit_rate > bounded.hit_rate + 0.05
    assert free.percentile_s(99) < 1.3 * of_language_models["least loaded"].percentile_s(99)


def test_the_bound_cuts_the_tail(of_language_models: dict[str, Outcome]) -> None:
    *_, free = of_language_models.values()
    assert free.percentile_s(99) < of_language_models["rendezvous"].percentile_s(99)


def test_a_replica_more_moves_little() -> None:
    trace = make_trace(150, 30)
    make_policy = policies(FREE_TILES)["rendezvous"]
    places = [encode(trace, make_policy, count).places for count in (4, 5)]
    moved = [new for old, new in zip(*places, strict=True) if old != new]
    assert set(moved) == {"10.0.0.4:1"} and 0.15 < len(moved) / len(places[0]) < 0.25


def test_the_program_prints_its_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PICTURE_LOADS", ((20, 10),))
    monkeypatch.setattr(placement, "CONVERSATION_LOADS", ((2, 60),))
    placement.main()
    said = capsys.readouterr().out
    assert said.count("| round robin |") == 2 and said.count("| hits |") == 2
