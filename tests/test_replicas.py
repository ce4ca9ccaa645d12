"""Two encoders and two language models behind one gateway, as processes: one of each is killed under load."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from deploy.embedded import embedded_checkpoint
from deploy.supervisor import free_ports
from protos import language_model_pb2, language_model_pb2_grpc
from tests.pictures import image_part, text_part, user
from tests.processes import ServiceProcess, wait_for_encoders
from tests.scenes import TILED, sign

SAY = "What does the sign say?"
LAST = "What does the last image say?"
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."
NUM_CLIENTS = 4
# Of all answers; the rest are streams that had begun.
REQUIRED_SHARE = 0.95


@dataclass(frozen=True)
class Question:
    messages: list[dict[str, Any]]
    answer: str


@dataclass
class Outcomes:
    right: int = 0
    errors: list[str] = field(default_factory=list)  # that a client can understand
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.right + len(self.errors) + len(self.wrong)


class Replicas:
    """Everything that runs."""

    def __init__(self, stack: ExitStack) -> None:
        checkpoint, ports = str(embedded_checkpoint()), free_ports(2)
        encoders = ",".join(f"127.0.0.1:{port}" for port in ports)
        at_once = ("--shutdown-grace-s", "0")
        llm = ("llm", checkpoint, "--port", "0", "--encoders", encoders, "--num-kv-blocks", "256", *at_once)
        commands = [*(("encoder", checkpoint, "--port", str(port), *at_once) for port in ports), llm, llm]
        with ThreadPoolExecutor() as threads:
            starting = [threads.submit(ServiceProcess, *command) for command in commands]
        stack.callback(lambda: stop_all([started.result() for started in starting]))
        self.encoders = [started.result() for started in starting[:2]]
        self.llms = [started.result() for started in starting[2:]]
        for language_model in self.llms:
            wait_for_encoders(language_model, len(self.encoders))
        targets = ",".join(llm.address for llm in self.llms)
        self.gateway = ServiceProcess("gateway", "--port", "0", "--llm", targets, *at_once)
        stack.callback(self.gateway.stop)
        self.url = f"http://{self.gateway.address}"

    @property
    def survivors(self) -> list[ServiceProcess]:
        return [self.gateway, self.encoders[1], self.llms[1]]


def stop_all(services: list[ServiceProcess]) -> None:
    with ThreadPoolExecutor() as threads:
        list(threads.map(ServiceProcess.stop, services))


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    with ExitStack() as stack:
        yield Replicas(stack)


def questions() -> Iterator[Question]:
    """One after the other; no two of them share a cache, so that every picture is encoded."""
    words = ("OPEN", "CLOSED", "EXIT", "TAXI", "HOTEL", "BANK")
    for number, word in enumerate(itertools.cycle(words)):
        many = [image_part(sign(one, TILED[7])) for one in ("BANK", "EXIT", word)]
        yield Question(user(image_part(sign(word)), text_part(SAY)), word)
        yield Question(user(text_part("Hello!")), GREETING)
        yield (
            Question(user(*many, text_part(LAST)), word)
            if number % 2
            else Question(user(text_part("Hello!")), GREETING)
        )


async def ask(client: httpx.AsyncClient, number: int, question: Question) -> tuple[str, bool]:
    """(text, whether it is an error); every other answer is streamed."""
    body: dict[str, Any] = {
        "messages": question.messages,
        "max_tokens": 48,
        "temperature": 0,
        "cache_salt": str(number),
    }
    if number % 2 == 0:
        response = await client.post("/v1/chat/completions", json=body)
        said = response.json()
        if response.status_code != 200:
            return error_of(said), True
        return str(said["choices"][0]["message"]["content"]), False
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return error_of(json.loads(await response.aread())), True
        text = ""
        async for chunk in chunks(response):
            if "error" in chunk:
                return error_of(chunk), True
            text += chunk["choices"][0]["delta"].get("content") or ""
        return text, False


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def error_of(body: dict[str, Any]) -> str:
    """The message of an error in OpenAI's form."""
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    return str(body["error"]["message"])


class Load:
    """Clients that ask one question after the other until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.outcomes = Outcomes()
        self._url = url
        self._questions = enumerate(questions())
        self._stopped = False

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            await asyncio.gather(*(self._ask_on(client) for _ in range(NUM_CLIENTS)))

    def stop(self) -> None:
        self._stopped = True

    async def more(self, count: int) -> None:
        """Return when so many more answers have come."""
        goal = self.outcomes.total + count
        async with asyncio.timeout(60):
            while self.outcomes.total < goal:
                await asyncio.sleep(0.01)

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        while not self._stopped:
            number, question = next(self._questions)
            text, is_error = await ask(client, number, question)
            if is_error:
                self.outcomes.errors.append(text)
            elif text == question.answer:
                self.outcomes.right += 1
            else:
                self.outcomes.wrong.append(f"{question.answer!r}, said {text!r}")


def load_of(llm: ServiceProcess) -> language_model_pb2.GetLanguageModelResponse:
    with grpc.insecure_channel(llm.address) as channel:
        stub = language_model_pb2_grpc.LanguageModelStub(channel)
        said = stub.GetModel(language_model_pb2.GetLanguageModelRequest(), timeout=5)
        assert isinstance(said, language_model_pb2.GetLanguageModelResponse)
        return said


def is_idle(llm: ServiceProcess) -> bool:
    said = load_of(llm)
    return not (said.sequences_running or said.sequences_waiting or said.kv_cache_usage > 1e-6)


def descriptors(service: ServiceProcess) -> int:
    return len(os.listdir(f"/proc/{service.process.pid}/fd"))


def children(service: ServiceProcess) -> list[int]:
    pid = service.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Any, what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


async def warm_up(replicas: Replicas) -> None:
    """Both encoders and both language models have answered: connections exist."""
    load = Load(replicas.url)
    running = asyncio.create_task(load.run())
    await load.more(12)
    load.stop()
    await running
    assert load.outcomes.right == load.outcomes.total, load.outcomes


def test_later_turns_find_their_kv_cache(replicas: Replicas) -> None:
    """Whichever language model a conversation began at."""
    with httpx.Client(base_url=replicas.url, timeout=60) as client:
        for number in range(6):
            body: dict[str, Any] = {
                "messages": user(image_part(sign("HOTEL")), text_part(SAY)),
                "max_tokens": 48,
                "temperature": 0,
                "cache_salt": f"conversation {number}",
            }
            said = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert said == "HOTEL"
            body["messages"] += [{"role": "assistant", "content": said}, *user(text_part("Thank you!"))]
            usage = client.post("/v1/chat/completions", json=body).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0, f"conversation {number}"


def test_one_of_each_dies_and_comes_back_under_load(replicas: Replicas) -> None:
    asyncio.run(warm_up(replicas))
    before = [descriptors(service) for service in replicas.survivors]
    engines = children(replicas.llms[0])
    load = Load(replicas.url)

    async def scenario() -> None:
        running = asyncio.create_task(load.run())
        await load.more(4)
        replicas.encoders[0].kill()
        await load.more(8)
        assert not load.outcomes.errors, load.outcomes  # the other encoder took over
        replicas.llms[0].kill()
        await load.more(8)
        dead = (replicas.encoders[0], replicas.llms[0])
        await asyncio.gather(*(asyncio.to_thread(one.start, "--port", str(one.port)) for one in dead))
        await load.more(8)
        load.stop()
        await running

    asyncio.run(scenario())
    outcomes = load.outcomes
    assert not outcomes.wrong and outcomes.right >= REQUIRED_SHARE * outcomes.total, outcomes
    assert all("language model" in error for error in outcomes.errors), outcomes
    for llm in replicas.llms:
        wait_for(lambda llm=llm: is_idle(llm), f"something is left: {load_of(llm)}")
    for engine in engines:
        wait_for(lambda engine=engine: not Path(f"/proc/{engine}").exists(), "an engine outlived its service")
    for service, count in zip(replicas.survivors, before, strict=True):
        wait_for(
            lambda service=service, count=count: descriptors(service) <= count + 4,
            f"{service.name} leaks descriptors: {count}, then {descriptors(service)}",
        )
