"""The scripted language model speaks the contract's order of events, with letters that tell the time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from deploy.bench.letters import LETTERS
from deploy.bench.scripted_llm import ScriptedLLM
from protos import language_model_pb2 as pb


def generate(request_id: int, max_tokens: int) -> pb.SessionRequest:
    request = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=max_tokens))
    return pb.SessionRequest(generate=pb.SessionGenerate(id=request_id, request=request))


async def events(
    llm: ScriptedLLM, requests: Iterable[pb.SessionRequest], num_usages: int = 1
) -> list[pb.SessionEvent]:
    """Up to the end of so many requests."""

    async def stream() -> AsyncIterator[pb.SessionRequest]:
        for request in requests:
            yield request
        await asyncio.Event().wait()

    found: list[pb.SessionEvent] = []
    async for response in llm.Session(stream(), None):
        found += response.events
        if sum(event.HasField("usage") for event in found) == num_usages:
            return found
    raise AssertionError("the stream ended")


def kinds(found: list[pb.SessionEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in found]


async def test_without_a_pace_an_answer_comes_whole() -> None:
    found = await events(ScriptedLLM("m"), [generate(1, 3)])
    assert kinds(found) == ["started", "delta", "finished", "usage"]
    assert len(found[1].delta.text) == len(found[1].delta.token_ids) == 3


async def test_each_message_holds_the_letters_of_its_steps() -> None:
    llm = ScriptedLLM("m")
    llm.set_pace(0.001, 4)
    found = await events(llm, [generate(1, 10)])
    texts = [event.delta.text for event in found if event.HasField("delta")]
    assert [len(text) for text in texts] == [4, 4, 2]
    assert "".join(texts) in LETTERS * 2
    assert found[-1].usage.completion_tokens == 10


async def test_a_cancelled_request_says_no_more() -> None:
    llm = ScriptedLLM("m")
    llm.set_pace(0.001, 1)
    cancel = pb.SessionRequest(cancel=pb.SessionCancel(id=1))
    found = await events(llm, [generate(1, 1000), cancel, generate(2, 4)])
    assert kinds([event for event in found if event.id == 1]) == ["started"]
