"""The trainer gets every fresh micro-batch once, waits only where it must, and hears of failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from deploy.demo_training.batches import Batch
from deploy.demo_training.feed import Feed

CPU = torch.device("cpu")


def batch(number: int) -> Batch:
    one = torch.tensor([number])
    return Batch(one, one, one, one, one, one, one, one, num_answers=1)


def numbered(amount: int, end: threading.Event) -> Iterator[Batch]:
    """So many at once, then none until the test is over."""
    yield from map(batch, range(amount))
    end.wait(30)


def test_without_a_memory_it_hands_out_what_is_made_in_order() -> None:
    feed = Feed(map(batch, range(100)), CPU, capacity=0, seed=0)
    assert [int(feed.take().ids) for _ in range(50)] == list(range(50))
    assert feed.num_fresh == 50


def test_it_repeats_kept_ones_while_the_workers_are_behind() -> None:
    end = threading.Event()
    try:
        feed = Feed(numbered(6, end), CPU, capacity=6, seed=0)
        taken: list[int] = []
        deadline = time.monotonic() + 10
        while feed.num_fresh < 6 or len(taken) < 40:
            taken.append(int(feed.take().ids))
            assert time.monotonic() < deadline
        assert taken[:4] == [0, 1, 2, 3], "it waits until half of its memory is full"
        assert set(taken) == set(range(6)) and len(taken) > feed.num_fresh
    finally:
        end.set()


def test_a_failing_maker_fails_the_trainer() -> None:
    def broken() -> Iterator[Batch]:
        yield batch(0)
        raise OSError("no fonts")

    feed = Feed(broken(), CPU, capacity=0, seed=0)
    feed.take()
    with pytest.raises(OSError, match="no fonts"):
        feed.take()
