"""Events between the session and whoever reads one answer."""

from __future__ import annotations

import asyncio

import pytest

from gateway.answer import MAX_SINGLE_EVENTS, Answer, joined
from gateway.events import CallDelta, Delta, Finished, Started, TokenLogprob, Usage
from protos.errors import Unavailable


async def test_everything_that_is_there_comes_at_once() -> None:
    answer = Answer(5)
    answer.push(Started(7))
    answer.push(Delta(0, "a", 1))
    assert await answer.next() == [Started(7), Delta(0, "a", 1)]
    asyncio.get_running_loop().call_later(0.02, answer.push, Delta(0, "b", 1))
    assert await answer.next() == [Delta(0, "b", 1)]
    answer.close()


async def test_silence_is_reported_again_and_again() -> None:
    answer, loop = Answer(0.05), asyncio.get_running_loop()
    start = loop.time()
    assert await answer.next() == [] and await answer.next() == []
    assert 0.08 < loop.time() - start < 0.5
    answer.close()


async def test_an_event_starts_the_silence_anew() -> None:
    answer, loop = Answer(0.1), asyncio.get_running_loop()
    for _ in range(3):
        loop.call_later(0.06, answer.push, Delta(0, "a", 1))
        assert await answer.next(), "0.06 s are no silence of 0.1 s"
    start = loop.time()
    assert await answer.next() == []
    assert loop.time() - start > 0.08
    answer.close()


async def test_an_error_comes_after_what_was_before_it() -> None:
    answer = Answer(5)
    answer.push(Delta(0, "a", 1))
    answer.fail(Unavailable("gone"))
    assert await answer.next() == [Delta(0, "a", 1)] and answer.has_more
    with pytest.raises(Unavailable):
        await answer.next()
    assert not answer.has_more


async def test_a_finished_answer_cannot_fail() -> None:
    answer = Answer(5)
    answer.push(Usage(1, 1))
    answer.fail(Unavailable("too late"))
    assert await answer.next() == [Usage(1, 1)] and not answer.has_more


async def test_a_reader_that_is_far_behind_gets_them_joined() -> None:
    answer = Answer(5)
    answer.push(Started(7))
    for number in range(10_000):
        answer.push(Delta(number % 2, f"{number} ", 1))
    for event in (Finished(0, "stop"), Finished(1, "length"), Usage(7, 10_000)):
        answer.push(event)
    events = await answer.next()
    assert len(events) <= MAX_SINGLE_EVENTS and events[0] == Started(7) and events[-1] == Usage(7, 10_000)
    for index in (0, 1):
        texts = [event.text for event in events if isinstance(event, Delta) and event.index == index]
        assert "".join(texts) == "".join(f"{number} " for number in range(index, 10_000, 2))
    assert sum(event.num_tokens for event in events if isinstance(event, Delta)) == 10_000


def test_joining_keeps_logprobs_and_the_order_of_ends() -> None:
    one, two = TokenLogprob("a", -1.0, b"a"), TokenLogprob("b", -2.0, b"b")
    events = [Delta(0, "a", 1, (one,)), Finished(1, "stop"), Delta(0, "b", 1, (two,)), Finished(0, "stop")]
    assert joined(events) == [Delta(0, "ab", 2, (one, two)), Finished(1, "stop"), Finished(0, "stop")]


def test_joined_deltas_have_each_call_once_and_all_thoughts() -> None:
    calls = [CallDelta(0, "", "look"), CallDelta(0, "{"), CallDelta(0, "}"), CallDelta(1, "", "stop")]
    deltas = [Delta(0, "", 1, reasoning="a"), Delta(0, "t", 1, reasoning="b")]
    deltas += [Delta(0, "", 1, calls=(call,)) for call in calls]
    whole = (CallDelta(0, "{}", "look"), CallDelta(1, "", "stop"))
    assert joined([*deltas]) == [Delta(0, "t", 6, (), "ab", whole)]
    later = [Delta(0, "", 1, calls=(CallDelta(1, "{"),)), Delta(0, "", 1, calls=(CallDelta(1, "}"),))]
    assert joined([*later]) == [Delta(0, "", 2, calls=(CallDelta(1, "{}"),))]
