"""Who gets what: the same for everybody, bounded, and moved only where it must be."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from protos.placement import MAX_LOAD_RATIO, Load, choose, rendezvous_order

KEYS = [hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(10_000)]
NAMES = [f"10.0.0.{number}:50051" for number in range(1, 6)]


def chosen(names: list[str]) -> list[str]:
    idle = dict.fromkeys(names, 0.0)
    return [choose(key, idle) for key in KEYS]


def test_the_order_of_names_does_not_matter() -> None:
    assert chosen(NAMES) == chosen(NAMES[::-1])


def test_everybody_gets_the_same_share() -> None:
    counts = Counter(chosen(NAMES))
    assert len(counts) == 5 and all(1850 < count < 2150 for count in counts.values())


@pytest.mark.parametrize("number", range(5))
def test_one_that_drains_moves_only_its_share_to_all_others(number: int) -> None:
    drained = NAMES[number]
    rest = [name for name in NAMES if name != drained]
    moves = [(old, new) for old, new in zip(chosen(NAMES), chosen(rest), strict=True) if old != new]
    assert {old for old, _ in moves} == {drained} and 1850 < len(moves) < 2150
    heirs = Counter(new for _, new in moves)
    assert set(heirs) == set(rest) and min(heirs.values()) > 400


def test_one_that_joins_takes_only_its_share() -> None:
    more = [*NAMES, "10.0.1.1:50051"]
    moves = [(old, new) for old, new in zip(chosen(NAMES), chosen(more), strict=True) if old != new]
    assert {new for _, new in moves} == {more[-1]} and 1500 < len(moves) < 1830


@pytest.mark.parametrize("weight", [1, 13])
def test_equal_keys_spread_when_they_come_together(weight: int) -> None:
    loads = dict.fromkeys(NAMES, 0.0)
    for _ in range(500):
        loads[choose(KEYS[0], loads, weight)] += weight
        assert max(loads.values()) <= MAX_LOAD_RATIO * sum(loads.values()) / len(loads) + weight
    assert max(loads, key=loads.__getitem__) == rendezvous_order(KEYS[0], NAMES)[0]


def test_who_is_passed_over_yields_to_the_next_in_order() -> None:
    order = rendezvous_order(KEYS[0], NAMES)
    loads = dict.fromkeys(NAMES, 1.0) | {order[0]: 9.0, order[1]: 9.0}
    assert choose(KEYS[0], loads) == order[2]


def test_a_free_load_is_none() -> None:
    order = rendezvous_order(KEYS[0], NAMES)
    loads = dict.fromkeys(NAMES, 0.0) | {order[0]: 8.0}
    assert choose(KEYS[0], loads, free=8) == order[0]
    assert choose(KEYS[0], loads, free=7) == order[1]


def test_a_load_is_our_own_now_and_that_of_others_at_the_last_report() -> None:
    load = Load()
    load.own = 3
    load.report(5)
    load.own = 10
    assert load.total == 12
    load.report(4)  # not all of ours has arrived there
    assert load.total == 10
