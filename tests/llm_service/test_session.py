"""Many requests on one stream, before a real engine; `serving` asserts that nothing is left of any."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from llm_service.generation import Generation
from llm_service.sampling_params import SamplingParams
from llm_service.session import Session
from protos import language_model_pb2 as pb
from protos.errors import Unavailable
from protos.failures import error_from_failure
from tests.llm_service.front_end import FrontEnd, PacedRunner, front_end
from tests.llm_service.test_from_proto import image, text
from tests.llm_service.test_generation import ask as ask_plain
from tests.llm_service.test_servicer import Service, ask, serving, wait_for


def generate(number: int, *parts: pb.Part, **fields: Any) -> pb.SessionRequest:
    return pb.SessionRequest(generate=pb.SessionGenerate(id=number, request=ask(*parts, **fields)))


def cancel(number: int) -> pb.SessionRequest:
    return pb.SessionRequest(cancel=pb.SessionCancel(id=number))


class Caller:
    """A gateway's end of the stream."""

    def __init__(self, it: Service) -> None:
        self.call = it.stub.Session()
        self.messages: list[pb.SessionResponse] = []
        self.kinds: dict[int, list[str]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.failures: dict[int, pb.Failure] = {}

    async def send(self, *requests: pb.SessionRequest) -> None:
        for request in requests:
            await self.call.write(request)

    async def read(self) -> bool:
        """One message; False at the end of the stream."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.messages.append(message)
        for event in message.events:
            kind = str(event.WhichOneof("event"))
            self.kinds[event.id].append(kind)
            if kind == "delta":
                self.texts[event.id] += event.delta.text
            elif kind == "failure":
                self.failures[event.id] = event.failure
        return True

    async def read_until(self, *numbers: int, kind: str = "usage") -> None:
        async with asyncio.timeout(5):
            while not all(kind in self.kinds[number] for number in numbers):
                assert await self.read()

    async def leave(self) -> None:
        await self.call.done_writing()
        async with asyncio.timeout(5):
            while await self.read():
                pass


class TestEvents:
    async def test_each_request_has_the_order_and_the_text_of_generate(self) -> None:
        async with serving() as it:
            numbers = range(1, 11)
            alone = {}
            for number in numbers:
                events = await it.generate(text("a" * number), max_tokens=20)
                alone[number] = "".join(event.delta.text for event in events)
            caller = Caller(it)
            await caller.send(*(generate(number, text("a" * number), max_tokens=20) for number in numbers))
            await caller.read_until(*numbers)
            assert caller.texts == alone
            for number in numbers:
                kinds = caller.kinds[number]
                assert kinds[0] == "started" and kinds[-2:] == ["finished", "usage"]
                assert set(kinds[1:-2]) == {"delta"}
            await caller.leave()

    async def test_a_step_is_at_most_one_message(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(*(generate(number, max_tokens=40) for number in range(4)))
            await caller.read_until(*range(4))
            # Beside the steps, what the engine says when it accepts a request.
            assert len(caller.messages) <= len(it.front.engine.runner.steps) + 4
            assert max(len({event.id for event in message.events}) for message in caller.messages) > 1
            await caller.leave()

    async def test_pictures_and_choices(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(generate(7, image(b"cat"), text("what"), n=2), generate(8))
            await caller.read_until(7, 8)
            assert caller.kinds[7].count("finished") == 2
            await caller.leave()

    async def test_trace_context_goes_on_to_the_encoder(self) -> None:
        async with serving() as it:
            caller, request = Caller(it), generate(1, image(b"cat"), request_id="mine")
            request.generate.metadata["traceparent"] = "00-a-b-01"
            await caller.send(request)
            await caller.read_until(1)
            [side] = it.front.encoder.sides
            assert (side.metadata["x-request-id"], side.metadata["traceparent"]) == ("mine", "00-a-b-01")
            await caller.leave()

    async def test_what_a_request_leaves_out_takes_the_checkpoints_defaults(self) -> None:
        async with serving(sampling=SamplingParams(max_tokens=5)) as it:
            caller, request = Caller(it), generate(1)
            request.generate.request.sampling.ClearField("max_tokens")
            await caller.send(request, generate(2, max_tokens=7))
            await caller.read_until(1, 2)
            events = [event for message in caller.messages for event in message.events]
            used = {event.id: event.usage.completion_tokens for event in events if event.HasField("usage")}
            assert used == {1: 5, 2: 7}
            await caller.leave()


class TestEnds:
    async def test_a_refusal_leaves_the_others_alone(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(generate(1, temperature=3), generate(2), generate(3, text("x" * 300)))
            await caller.read_until(2)
            await caller.read_until(1, 3, kind="failure")
            assert caller.kinds[1] == ["failure"] and caller.failures[1].field == "sampling.temperature"
            assert caller.failures[3].reason == "context_length_exceeded"
            await caller.leave()

    @pytest.mark.parametrize("parts", [[text("a")], [image(b"cat")]], ids=["text", "picture"])
    async def test_a_cancel_frees_the_request_and_no_other(self, parts: list[pb.Part]) -> None:
        async with serving() as it:
            caller, engine = Caller(it), it.front.engine
            engine.runner.pace()
            stepping = asyncio.create_task(step_slowly(engine.runner))  # 200 tokens take seconds
            await caller.send(generate(1, *parts, max_tokens=200), generate(2, max_tokens=200))
            await caller.read_until(1, 2, kind="delta")
            await caller.send(cancel(1))
            await wait_for(lambda: len(engine.scheduler.groups) == 1)
            stepping.cancel()
            engine.runner.unpace()
            await caller.read_until(2)
            assert "finished" not in caller.kinds[1]
            await caller.leave()

    async def test_a_cancel_before_the_prompt_is_known(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(*(generate(number) for number in range(20)))
            await caller.send(*(cancel(number) for number in range(20)), cancel(99), generate(20))
            await caller.read_until(20)
            await caller.leave()

    async def test_a_caller_that_disappears_frees_all(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(*(generate(number, image(b"a"), max_tokens=150) for number in range(5)))
            await caller.read_until(0, kind="delta")
            caller.call.cancel()
            await it.front.nothing_is_left()

    async def test_an_engine_that_goes_away_fails_each(self) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(generate(1, max_tokens=200), generate(2, max_tokens=200))
            await caller.read_until(1, 2, kind="started")
            await it.front.engine.stop()
            await caller.read_until(1, 2, kind="failure")
            assert type(error_from_failure(caller.failures[1])) is Unavailable
            await caller.leave()

    @pytest.mark.parametrize("second", [generate(1), pb.SessionRequest()], ids=["same id", "empty"])
    async def test_whoever_breaks_the_protocol_loses_the_stream(self, second: pb.SessionRequest) -> None:
        async with serving() as it:
            caller = Caller(it)
            await caller.send(generate(1, max_tokens=200), second)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await caller.leave()
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await it.front.nothing_is_left()


async def step_slowly(runner: PacedRunner) -> None:
    while True:
        runner.allow(1)
        await asyncio.sleep(0.02)


def local_session(front: FrontEnd, max_tokens: int) -> Session:
    """Without gRPC between, whose buffers would take what nobody reads."""
    backends = front.backends

    def make(message: pb.SessionGenerate) -> tuple[Generation, str]:
        return Generation(ask_plain("a" * message.id, max_tokens=max_tokens), backends), ""

    return Session(make)


async def pending(*requests: pb.SessionRequest) -> AsyncIterator[pb.SessionRequest]:
    for request in requests:
        yield request
    await asyncio.Event().wait()


async def test_what_a_slow_caller_has_not_taken_is_joined() -> None:
    async with front_end() as it:
        requests = [generate(number) for number in (1, 2, 3)]
        received: list[pb.SessionResponse] = []
        runner, engine = it.engine.runner, it.backends.engine
        runner.pace()
        async with aclosing(local_session(it, 60).run(pending(*requests))) as messages:
            received.append(await anext(messages))

            def all_run() -> bool:
                runner.allow(1)
                return engine.stats.num_running == 3

            await wait_for(all_run)
            runner.unpace()
            await wait_for(lambda: engine.stats.num_running == 0)  # comes with the last tokens
            events: list[pb.SessionEvent] = []
            while sum(event.HasField("usage") for event in events) < 3:
                received.append(await anext(messages))
                events = [event for message in received for event in message.events]
        assert len(received) <= 3, "one was under way, one made while it was not taken"
        for number in (1, 2, 3):
            deltas = [event.delta for event in events if event.id == number and event.HasField("delta")]
            assert sum(len(delta.token_ids) for delta in deltas) == 60


async def test_draining_refuses_new_requests_and_ends_behind_the_last() -> None:
    async with front_end() as it:
        more = asyncio.Event()

        async def requests() -> AsyncIterator[pb.SessionRequest]:
            yield generate(1)
            await more.wait()
            yield generate(2)
            await asyncio.Event().wait()

        it.engine.runner.pace()
        session = local_session(it, 10)
        events = []
        async with aclosing(session.run(requests())) as messages, asyncio.timeout(5):
            async for message in messages:
                events += message.events
                if not more.is_set():
                    session.drain()
                    more.set()
                    it.engine.runner.unpace()
        assert [event.id for event in events if event.HasField("usage")] == [1]
        [failure] = [event.failure for event in events if event.id == 2]
        assert type(error_from_failure(failure)) is Unavailable


async def test_an_idle_session_ends_when_the_service_drains() -> None:
    async with serving() as it:
        caller = Caller(it)
        await caller.send(generate(1))
        await caller.read_until(1)
        it.servicer.drain()
        async with asyncio.timeout(10):
            assert not await caller.read()
        assert await caller.call.code() is grpc.StatusCode.OK
        late = Caller(it)
        async with asyncio.timeout(10):
            assert not await late.read()
