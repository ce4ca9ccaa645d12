"""The pool of language-model services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import grpc
import pytest

from gateway.events import Delta, Event, Restarted, Started, Usage
from gateway.llm_client import FREE_SEQUENCES, MAX_ATTEMPTS, LLMClient
from gateway.llm_target import AVOID_S, LLMTarget
from gateway.model_info import ModelInfo
from protos import language_model_pb2 as pb
from protos.directory import Replica
from protos.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.placement import rendezvous_order
from tests.gateway.scripted import (
    Script,
    ScriptedLLM,
    default_info,
    delta,
    finished,
    hangs_after,
    replies,
    says,
    started,
    usage,
)

KEY = b"a conversation"


@asynccontextmanager
async def _pool(*scripts: Script) -> AsyncIterator[tuple[LLMClient, list[ScriptedLLM], list[int]]]:
    """The services in the order in which KEY prefers them."""
    async with AsyncExitStack() as stack:
        services = {}
        for script in scripts:
            service = ScriptedLLM(script)
            services[f"127.0.0.1:{await service.listen()}"] = service
            stack.push_async_callback(service.stop)
        order = rendezvous_order(KEY, services)
        for address, script in zip(order, scripts, strict=True):
            services[address].script = script
        client = LLMClient(list(services), model_timeout_s=0.5)
        stack.push_async_callback(client.close)
        yield client, [services[address] for address in order], [_port(address) for address in order]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def _generate(
    client: LLMClient, key: bytes = KEY, is_kept: bool = False, uploads: Sequence[bytes] = ()
) -> list[Event]:
    call = client.generate(
        pb.GenerateRequest(), key=key, metadata=(), timeout_s=5, is_kept=is_kept, uploads=uploads
    )
    async with aclosing(call) as events:
        return [event async for batch in events for event in batch]


def _texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Delta)]


async def test_a_conversation_stays_where_it_is() -> None:
    async with _pool(says("a"), says("a"), says("a")) as (client, services, _):
        for _ in range(4):
            assert isinstance((await _generate(client))[-1], Usage)
    assert [len(service.requests) for service in services] == [4, 0, 0]


async def test_conversations_spread_alike_for_every_gateway() -> None:
    async with _pool(says("a"), says("a"), says("a")) as (client, services, ports):
        other = LLMClient([f"127.0.0.1:{port}" for port in reversed(ports)])
        for number in range(30):
            await _generate(client, b"%d" % number)
        counts = [len(service.requests) for service in services]
        for number in range(30):
            await _generate(other, b"%d" % number)
        await other.close()
    assert min(counts) >= 3
    assert [len(service.requests) for service in services] == [2 * count for count in counts]


async def test_a_busy_service_is_passed_over() -> None:
    async with _pool(hangs_after(started()), says("a")) as (client, services, _):
        async with AsyncExitStack() as stack:
            for _ in range(int(FREE_SEQUENCES) + 2):
                call = client.generate(pb.GenerateRequest(), key=KEY, metadata=(), timeout_s=5)
                await anext(await stack.enter_async_context(aclosing(call)))
            await _generate(client)
        async with asyncio.timeout(10):
            await services[0].cancelled.wait()
    assert len(services[1].requests) >= 1


async def test_what_others_have_sent_to_a_service_counts() -> None:
    async with _pool(says("a"), says("a")) as (client, services, _):
        services[0].info = default_info(sequences_running=90, sequences_waiting=10)
        await client.models()
        await _generate(client)
    assert [len(service.requests) for service in services] == [0, 1]


async def test_choices_count_one_by_one() -> None:
    async with _pool(hangs_after(started()), says("a")) as (client, services, _):
        many = pb.GenerateRequest(sampling=pb.SamplingParams(n=100))
        async with aclosing(client.generate(many, key=KEY, metadata=(), timeout_s=5)) as busy:
            await anext(busy)
            await _generate(client)
    assert [len(service.requests) for service in services] == [1, 1]


class TestAnotherIsAsked:
    @pytest.mark.parametrize("said", [[], [started()]], ids=["nothing", "started"])
    async def test_when_one_dies_before_it_has_said_anything(self, said: list[pb.GenerateResponse]) -> None:
        async with _pool(replies(*said, OSError("killed")), says("b")) as (client, services, _):
            dying = services[0]
            dying.dies_with_its_script = True
            assert _texts(await _generate(client)) == ["b"]
        assert [len(service.requests) for service in services] == [1, 1]

    async def test_when_one_is_not_there_and_it_is_found_again(self) -> None:
        async with _pool(says("a"), says("b")) as (client, services, ports):
            await services[0].stop()
            for _ in range(4):
                assert _texts(await _generate(client)) == ["b"]
            await services[0].listen(ports[0])
            async with asyncio.timeout(AVOID_S + 30):
                while not services[0].requests:
                    await asyncio.sleep(0.05)
                    assert await _generate(client)

    async def test_when_one_is_full(self) -> None:
        full = replies(Overloaded("the queue is full", retry_after_s=4))
        async with _pool(full, says("b")) as (client, services, _):
            assert _texts(await _generate(client)) == ["b"]
            services[0].script = says("a")
            assert _texts(await _generate(client)) == ["a"]  # it was there all the time

    async def test_and_when_all_are_full_the_client_is_told_when_to_come_back(self) -> None:
        full = replies(Overloaded("the queue is full", retry_after_s=4))
        async with _pool(full, replies(Unavailable("going down"))) as (client, _, _):
            with pytest.raises(Overloaded) as caught:
                await _generate(client)
            assert caught.value.retry_after_s == 4

    @pytest.mark.parametrize(
        "said",
        [
            pb.Delta(text="a"),
            pb.Delta(reasoning="hm"),
            pb.Delta(tool_calls=[pb.ToolCallDelta(name="look")]),
        ],
    )
    async def test_but_not_once_something_was_said(self, said: pb.Delta) -> None:
        script = replies(started(), pb.GenerateResponse(delta=said), OSError("killed"))
        async with _pool(script, says("b")) as (
            client,
            services,
            _,
        ):
            services[0].dies_with_its_script = True
            with pytest.raises(Unavailable, match="not reachable"):
                await _generate(client)
        assert services[1].requests == []

    async def test_unless_the_caller_kept_it_to_himself(self) -> None:
        async with _pool(replies(started(), delta("a"), OSError("killed")), says("b")) as (
            client,
            services,
            _,
        ):
            services[0].dies_with_its_script = True
            events = await _generate(client, is_kept=True)
        assert _texts(events) == ["a", "b"] and isinstance(events[events.index(Restarted()) + 1], Started)

    async def test_but_not_for_what_is_wrong_with_the_request(self) -> None:
        async with _pool(replies(InvalidRequest("no")), says("b")) as (client, services, _):
            with pytest.raises(InvalidRequest):
                await _generate(client)
        assert services[1].requests == []

    async def test_but_a_request_that_kills_each_of_them_is_given_up(self) -> None:
        async with _pool(*[replies(started(), OSError("killed"))] * 5) as (client, services, _):
            for service in services:
                service.dies_with_its_script = True
            with pytest.raises(Unavailable):
                await _generate(client)
        assert sum(len(service.requests) for service in services) == MAX_ATTEMPTS

    async def test_within_the_time_that_the_request_has(self) -> None:
        async with _pool(replies(started(), OSError("killed")), hangs_after(started())) as (
            client,
            services,
            _,
        ):
            services[0].dies_with_its_script = True
            call = client.generate(pb.GenerateRequest(), key=KEY, metadata=(), timeout_s=0.5)
            with pytest.raises(DeadlineExceeded):
                async with aclosing(call) as events:
                    async for _ in events:
                        pass
        assert len(services[1].requests) == 1


class TestStarted:
    """A client that looks after its services by itself."""

    async def test_one_that_does_not_answer_is_avoided_before_a_request_fails(self) -> None:
        async with _pool(says("a"), says("b")) as (client, services, _):
            client.start()
            services[0].answers_get_model = False
            target = client._targets[rendezvous_order(KEY, client._targets)[0]]
            async with asyncio.timeout(10):
                while not target.is_avoided:
                    await asyncio.sleep(0.01)
            assert _texts(await _generate(client)) == ["b"] and services[0].requests == []
            services[0].answers_get_model = True
            async with asyncio.timeout(10):
                while target.is_avoided:
                    await asyncio.sleep(0.01)
            assert _texts(await _generate(client)) == ["a"]

    async def test_each_address_of_a_name_is_a_service(self) -> None:
        async with _pool(says("a"), says("b")) as (_, services, ports):
            addresses = [f"127.0.0.1:{port}" for port in ports]

            async def look_up(host: str, port: int) -> list[str]:
                assert (host, port) == ("llm.internal", 50052)
                return list(addresses)

            client = LLMClient(["dns:///llm.internal:50052"], lookup=look_up)
            assert _texts(await _generate(client)) == ["a"]
            assert len(await client.models()) == 2
            del addresses[0]
            await client._replicas.resolve(5)
            assert _texts(await _generate(client)) == ["b"]
            await client.close()

    async def test_one_that_leaves_its_name_finishes_its_answers(self) -> None:
        go_on = asyncio.Event()

        async def slow(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
            yield started()
            await go_on.wait()
            for event in (delta("late"), finished(), usage()):
                yield event

        async with _pool(slow, says("b")) as (_, services, ports):
            addresses = [f"127.0.0.1:{port}" for port in ports]

            async def look_up(host: str, port: int) -> list[str]:
                return list(addresses)

            client = LLMClient(["dns:///llm.internal:50052"], lookup=look_up)
            answering = asyncio.create_task(_generate(client))
            async with asyncio.timeout(5):
                while not services[0].requests:
                    await asyncio.sleep(0.01)
            del addresses[0]
            await client._replicas.resolve(5)
            assert _texts(await _generate(client)) == ["b"]
            go_on.set()
            assert _texts(await answering) == ["late"]
            async with asyncio.timeout(10):
                while client._replicas.leaving:
                    await asyncio.sleep(0.01)
            await client.close()

    async def test_one_that_leaves_its_name_finishes_its_uploads(self) -> None:
        async with _pool(says("a"), says("b")) as (_, services, ports):
            addresses = [f"127.0.0.1:{port}" for port in ports]

            async def look_up(host: str, port: int) -> list[str]:
                return list(addresses)

            client = LLMClient(["dns:///llm.internal:50052"], lookup=look_up)
            services[0].takes_uploads.clear()
            answering = asyncio.create_task(_generate(client, uploads=[b"a video"]))
            async with asyncio.timeout(10):
                while not services[0].uploads_begun:
                    await asyncio.sleep(0.01)
            del addresses[0]
            await client._replicas.resolve(5)
            [leaving] = client._replicas.leaving
            done, _pending = await asyncio.wait([leaving], timeout=0.2)
            assert not done
            services[0].takes_uploads.set()
            assert _texts(await answering) == ["a"]
            async with asyncio.timeout(10):
                while client._replicas.leaving:
                    await asyncio.sleep(0.01)
            await client.close()

    async def test_one_that_leaves_its_name_finishes_its_tokenization(self) -> None:
        async with _pool(says("a")) as (_, [service], [port]):
            addresses = [f"127.0.0.1:{port}"]

            async def look_up(host: str, port: int) -> list[str]:
                return list(addresses)

            client = LLMClient(["dns:///llm.internal:50052"], lookup=look_up)
            service.takes_texts.clear()
            tokenizing = asyncio.create_task(client.tokenize("a"))
            async with asyncio.timeout(10):
                while not service.tokenized:
                    await asyncio.sleep(0.01)
            addresses[0] = "127.0.0.1:1"
            await client._replicas.resolve(5)
            [leaving] = client._replicas.leaving
            done, _pending = await asyncio.wait([leaving], timeout=0.2)
            assert not done
            service.takes_texts.set()
            assert await tokenizing == [97]
            async with asyncio.timeout(10):
                while client._replicas.leaving:
                    await asyncio.sleep(0.01)
            await client.close()

    async def test_a_name_that_nobody_knows_is_unavailable(self) -> None:
        async def look_up(host: str, port: int) -> list[str]:
            raise OSError("no such name")

        client = LLMClient(["dns:///llm.internal:50052"], lookup=look_up)
        with pytest.raises(Unavailable, match="not reachable"):
            await _generate(client)
        with pytest.raises(Unavailable, match="not reachable"):
            await client.model()
        await client.close()


async def test_text_of_grpc_itself_is_replaced() -> None:
    async with _pool(says("a")) as (client, services, ports):
        await services[0].stop()
        with pytest.raises(Unavailable) as caught:
            await _generate(client)
    assert str(ports[0]) not in caught.value.message and "not reachable" in caught.value.message


async def test_text_of_the_service_is_kept() -> None:
    async with _pool(replies(Overloaded("the queue is full", retry_after_s=4))) as (client, _, _):
        with pytest.raises(Overloaded, match="the queue is full") as caught:
            await _generate(client)
    assert caught.value.retry_after_s == 4


async def test_a_call_that_the_service_cancels_is_an_error_and_not_our_cancellation() -> None:
    async with _pool(replies(started(), Cancelled("x"))) as (client, _, _):
        with pytest.raises(Cancelled):
            await _generate(client)


async def test_the_model_is_remembered_while_its_service_is_away() -> None:
    async with _pool(says("a")) as (client, services, _):
        known = await client.model()
        await services[0].stop()
        with pytest.raises(Unavailable):
            await _generate(client)
        assert await client.model() == known


async def test_nobody_has_ever_answered() -> None:
    async with _pool(says("a")) as (client, services, _):
        services[0].answers_get_model = False
        with pytest.raises(Unavailable, match="does not answer"):
            await client.model()


async def test_each_service_answers_for_itself() -> None:
    async with _pool(says("a"), says("a")) as (client, services, _):
        services[0].info = default_info(encoders_ready=0)
        await services[1].stop()
        answers = await client.models()
    [there] = [answer for answer in answers if isinstance(answer, ModelInfo)]
    assert there.encoders_ready == 0
    assert sum(isinstance(answer, ServingError) for answer in answers) == 1


async def test_a_connection_that_breaks_under_a_write_is_a_service_that_is_gone() -> None:
    """grpc.aio calls it INTERNAL; as such nobody would ask another service."""
    target = LLMTarget(Replica("127.0.0.1:1", ""), None, 1.0)
    no_metadata = grpc.aio.Metadata()
    broken = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, no_metadata, no_metadata, "Internal error from Core"
    )
    failure = target._failure(broken)
    assert (type(failure), failure.message) == (Unavailable, "The language model is not reachable.")
    failed = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, no_metadata, no_metadata, "a library's words")
    assert type(target._failure(failed)) is ModelError
    await target.close()
