"""Work ends with the client, and nothing of it outlives the call."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from gateway.disconnect import until_disconnect
from gateway.errors import ClientDisconnected


class Client:
    """`leave` makes it disconnect; before that its body ends again and again."""

    def __init__(self) -> None:
        self._left = asyncio.Event()
        self._said = 0

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        self._said += 1
        if self._said <= 2:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Runs until cancelled, and takes a moment to clean up."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cleaned_up = False

    async def run(self) -> None:
        try:
            self.began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.cleaned_up = True


def other_tasks() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {task for task in [asyncio.current_task()] if task is not None}


async def test_the_result_comes_back_and_the_client_is_no_longer_watched() -> None:
    async def work() -> str:
        await asyncio.sleep(0.01)
        return "done"

    assert await until_disconnect(Client().receive, work()) == "done"
    assert not other_tasks()


async def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    async def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await until_disconnect(Client().receive, work())
    assert not other_tasks()


async def test_work_has_cleaned_up_before_the_disconnect_is_raised() -> None:
    client, work = Client(), Work()
    asyncio.get_running_loop().call_later(0.01, client.leave)
    with pytest.raises(ClientDisconnected):
        await until_disconnect(client.receive, work.run())
    assert work.cleaned_up and not other_tasks()


async def test_work_that_is_done_when_the_client_leaves_counts_as_done() -> None:
    client = Client()

    async def work() -> str:
        client.leave()
        return "done"

    assert await until_disconnect(client.receive, work()) == "done"


async def test_cancelling_the_caller_cancels_the_work() -> None:
    work = Work()
    calling = asyncio.create_task(until_disconnect(Client().receive, work.run()))
    await work.began.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert work.cleaned_up and not other_tasks()
