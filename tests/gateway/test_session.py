"""Many requests on one stream to a scripted service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

from gateway.answer import Answer
from gateway.events import Delta, Event, Usage
from gateway.session import Session
from protos import language_model_pb2 as pb
from protos import language_model_pb2_grpc
from protos.channel import open_channel
from protos.errors import ModelError, Overloaded, ServingError, Unavailable
from tests.gateway.scripted import Script, ScriptedLLM, delta, finished, hangs_after, started, usage


@dataclass
class Line:
    llm: ScriptedLLM
    session: Session

    def ask(self, request_id: str = "") -> tuple[int, Answer]:
        answer = Answer(5)
        return self.session.ask(pb.GenerateRequest(request_id=request_id), (), answer), answer


@asynccontextmanager
async def line(script: Script) -> AsyncIterator[Line]:
    llm = ScriptedLLM(script)
    channel = open_channel(f"127.0.0.1:{await llm.listen()}")

    def failure_of(_error: grpc.RpcError) -> ServingError:
        return Unavailable("broken")

    session = Session(language_model_pb2_grpc.LanguageModelStub(channel), failure_of)
    try:
        async with asyncio.timeout(10):
            yield Line(llm, session)
    finally:
        await session.close()
        await channel.close()
        await llm.stop()


async def read(answer: Answer) -> list[Event]:
    events: list[Event] = []
    try:
        while answer.has_more:
            events += await answer.next()
    finally:
        answer.close()
    return events


async def echo(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Its own id, letter by letter, while others do the same."""
    yield started()
    for letter in request.request_id:
        await asyncio.sleep(0)
        yield delta(letter)
    yield finished()
    yield usage(completion=len(request.request_id))


async def test_answers_do_not_mix() -> None:
    async with line(echo) as it:
        names = [f"request-{number}" for number in range(100)]
        answers = [it.ask(name)[1] for name in names]
        for name, events in zip(names, await asyncio.gather(*map(read, answers)), strict=True):
            assert "".join(event.text for event in events if isinstance(event, Delta)) == name
            assert isinstance(events[-1], Usage)


async def test_leaving_one_cancels_it_and_no_other() -> None:
    async with line(hangs_after(started(), delta("a"))) as it:
        (first, left), (_, kept) = it.ask(), it.ask()
        await left.next()
        await kept.next()
        it.session.leave(first)
        await it.llm.cancelled.wait()
        assert it.llm.cancels == [first] and not kept.has_ended


async def test_one_that_is_left_before_it_is_sent_is_never_sent() -> None:
    async with line(echo) as it:
        number, _ = it.ask("a")
        it.session.leave(number)
        await read(it.ask("b")[1])
        assert [request.request_id for request in it.llm.requests] == ["b"] and it.llm.cancels == []


async def test_what_has_ended_is_not_cancelled() -> None:
    async with line(echo) as it:
        number, answer = it.ask("a")
        await read(answer)
        it.session.leave(number)
        await read(it.ask("b")[1])
        assert it.llm.cancels == []


async def test_a_failure_is_its_requests_own() -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.request_id == "bad":
            raise Overloaded("full", retry_after_s=4)
        async for event in echo(request):
            yield event

    async with line(script) as it:
        bad, good = it.ask("bad")[1], it.ask("good")[1]
        with pytest.raises(Overloaded, match="full") as raised:
            await read(bad)
        assert raised.value.retry_after_s == 4
        assert isinstance((await read(good))[-1], Usage)


async def test_a_service_that_dies_fails_all_of_them_with_errors_of_their_own() -> None:
    async with line(hangs_after(started())) as it:
        answers = [it.ask()[1] for _ in range(3)]
        for answer in answers:
            await answer.next()
        await it.llm.stop()
        errors = await asyncio.gather(*map(read, answers), return_exceptions=True)
        assert [type(error) for error in errors] == [Unavailable] * 3 and len(set(map(id, errors))) == 3
        assert it.session.has_ended


async def test_a_stream_that_ends_in_good_order_was_asked_too_late_or_is_broken() -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.request_id == "begun":
            yield started()
        if request.request_id != "ends the stream":
            await asyncio.Event().wait()

    async with line(script) as it:
        begun, new = it.ask("begun")[1], it.ask("new")[1]
        await begun.next()
        it.ask("ends the stream")
        with pytest.raises(ModelError):
            await read(begun)
        with pytest.raises(Unavailable):
            await read(new)


async def test_an_end_for_a_reason_of_tomorrow_is_an_error_and_cancelled() -> None:
    async with line(hangs_after(started(), finished(reason=99))) as it:
        number, answer = it.ask()
        with pytest.raises(ModelError, match="reason"):
            await read(answer)
        it.session.leave(number)
        await it.llm.cancelled.wait()


async def test_closing_fails_what_is_left() -> None:
    async with line(hangs_after(started())) as it:
        answer = it.ask()[1]
        await it.session.close()
        with pytest.raises(ServingError):
            await read(answer)
