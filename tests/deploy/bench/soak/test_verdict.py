from __future__ import annotations

from dataclasses import replace

from deploy.bench.soak.processes import Usage
from deploy.bench.soak.rest import Rest
from deploy.bench.soak.verdict import MIB, faults, rows

ROUND_S = 30.0
NUM_RESTS = 60


def run(growth: float = 0.0, num_rests: int = NUM_RESTS) -> list[Rest]:
    """Rests of an engine that grows by so many MiB an hour, and shakes by 2 MiB."""
    return [rest(number, growth) for number in range(num_rests)]


def rest(number: int, growth: float) -> Rest:
    at_s = number * ROUND_S
    shaken = 2 * (number * 7 % 5) / 5
    rss = round((500 + shaken + growth * at_s / 3600) * MIB)
    levels = {"llm tessera_llm_kv_cache_usage": 0.0}
    return Rest(at_s, number * 100, {"engine": Usage((7,), rss, 12, 3)}, levels, strays={})


def with_last(rests: list[Rest], **changes: object) -> list[Rest]:
    last = rests[-1]
    usage = replace(last.usages["engine"], **changes)  # type: ignore[arg-type]
    return [*rests[:-1], replace(last, usages={"engine": usage})]


def test_a_process_that_holds_its_level_is_right() -> None:
    assert faults(run()) == []


def test_a_leak_is_named_with_its_rate() -> None:
    [fault] = faults(run(growth=100))
    assert fault.startswith("engine: memory grows by at least ")
    assert 80 < int(fault.split()[-4]) < 100


def test_slow_growth_is_borne() -> None:
    assert faults(run(growth=40)) == []


def test_what_a_short_run_cannot_tell_from_noise_is_no_leak() -> None:
    assert faults([replace(rest, at_s=rest.at_s / 30) for rest in run(growth=10)]) == []


def test_a_heap_that_has_not_settled_may_take_its_first_piece() -> None:
    minute = [replace(rest, at_s=rest.at_s / 20) for rest in run(growth=150)]
    assert rows(minute)[0].trend.least * 3600 > 1000 * MIB
    assert faults(minute) == []
    assert faults([replace(rest, at_s=rest.at_s / 20) for rest in run(growth=500)])


def test_growth_in_the_warm_up_is_no_leak() -> None:
    rests = run()
    rests[:8] = [rest(number, growth=-3000) for number in range(8)]
    assert faults(rests) == []


def test_a_descriptor_that_is_left_over_is_a_fault() -> None:
    assert faults(with_last(run(), fds=13)) == ["engine: 13 descriptors, 12 when warm"]


def test_a_thread_that_is_left_over_is_a_fault() -> None:
    assert faults(with_last(run(), threads=99)) == ["engine: 99 threads, 3 when warm"]


def test_a_process_that_was_started_again_is_a_fault() -> None:
    [fault] = faults(with_last(run(), pids=(8,)))
    assert fault.startswith("engine: other processes")


def test_a_gauge_that_is_not_back_is_a_fault() -> None:
    rests = run()
    rests[5] = replace(rests[5], strays={"llm tessera_llm_kv_cache_usage": 0.01})
    assert faults(rests) == ["rest 5: left over: {'llm tessera_llm_kv_cache_usage': 0.01}"]


def test_a_run_without_rests_is_no_success() -> None:
    assert faults([]) and faults(run(num_rests=1))


def test_bytes_an_action_follow_from_the_slope() -> None:
    [row] = rows([replace(rest, num_actions=round(rest.at_s)) for rest in run(growth=3600)])
    assert abs(row.per_action - MIB) < 0.02 * MIB


def test_a_heap_that_goes_up_and_down_is_no_leak() -> None:
    rests = run()
    for number, each in enumerate(rests):
        usage = each.usages["engine"]
        shaken = replace(usage, rss=usage.rss + number * 13 % 7 * 5 * MIB + number * MIB // 4)
        rests[number] = replace(each, usages={"engine": shaken})
    assert rows(rests)[0].trend.least * 3600 > 16 * MIB or rows(rests)[0].noise > 20 * MIB
    assert faults(rests) == []
