from __future__ import annotations

import pytest

from gateway.access_config import AccessConfig
from gateway.errors import RateLimited
from gateway.events import Delta, Started
from gateway.key_limits import Allowance, Caller


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(caller: Caller) -> tuple[str, float]:
    with pytest.raises(RateLimited) as caught:
        caller.enter()
    assert caught.value.retry_after_s is not None
    return caught.value.message, caught.value.retry_after_s


def test_without_limits_everything_is_let_in() -> None:
    caller = Caller(AccessConfig())
    for _ in range(1000):
        caller.enter()
        caller.charge([Started(1_000_000)])


def test_requests_come_back_evenly() -> None:
    clock = Clock()
    caller = Caller(AccessConfig(key_requests_per_minute=6), clock=clock)
    for _ in range(6):
        caller.enter()
    message, wait_s = refused(caller)
    assert "requests per minute" in message and wait_s == pytest.approx(10)
    clock.now += 10
    caller.enter()
    refused(caller)
    clock.now += 3600  # no more than a minute's worth is saved
    for _ in range(6):
        caller.enter()
    refused(caller)


def test_a_place_is_free_again_when_a_request_ends() -> None:
    caller = Caller(AccessConfig(key_concurrency=2))
    caller.enter()
    caller.enter()
    assert "at a time" in refused(caller)[0]
    caller.leave()
    caller.enter()


def test_tokens_are_charged_as_they_come_and_debts_wait() -> None:
    clock = Clock()
    caller = Caller(AccessConfig(key_tokens_per_minute=600), clock=clock)
    caller.enter()
    caller.charge([Started(500), Delta(0, "a", 60), Delta(1, "b", 339)])  # 299 too many
    message, wait_s = refused(caller)
    assert "tokens per minute" in message and wait_s == pytest.approx(30)
    clock.now += 30
    caller.enter()


def test_a_refused_request_is_not_counted() -> None:
    caller = Caller(AccessConfig(key_concurrency=1, key_requests_per_minute=2), clock=Clock())
    caller.enter()
    refused(caller)
    caller.leave()
    caller.enter()
    assert caller.num_running == 1


def test_processes_share_the_limits() -> None:
    caller = Caller(AccessConfig(key_concurrency=8, key_requests_per_minute=100), share=4)
    for _ in range(2):
        caller.enter()
    refused(caller)


def test_what_is_left_is_told_and_comes_back() -> None:
    clock = Clock()
    caller = Caller(AccessConfig(key_requests_per_minute=6, key_tokens_per_minute=600), clock=clock)
    assert caller.allowances() == [Allowance("requests", 6, 6, 0.0), Allowance("tokens", 600, 600, 0.0)]
    caller.enter()
    caller.charge([Started(900)])
    assert caller.allowances() == [Allowance("requests", 6, 5, 10.0), Allowance("tokens", 600, 0, 90.0)]
    clock.now += 80
    assert caller.allowances() == [Allowance("requests", 6, 6, 0.0), Allowance("tokens", 600, 500, 10.0)]
    assert Caller(AccessConfig(key_concurrency=1)).allowances() == []


def test_a_process_tells_its_own_share() -> None:
    caller = Caller(AccessConfig(key_requests_per_minute=6), share=2, clock=Clock())
    assert caller.allowances() == [Allowance("requests", 3, 3, 0.0)]
