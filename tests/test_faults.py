"""Requests while encoders die, hang, lie and come back with other weights: right answers or clear errors."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deploy.embedded import embedded_checkpoint
from deploy.random_checkpoint import TOKENIZER_SIZE, CheckpointShape, write_random_checkpoint
from tests.pictures import image_part, text_part, user
from tests.processes import ServiceProcess, wait_for_encoders, wait_idle
from tests.scenes import TILED, clip, sign, things

NUM_REQUESTS = 200
CONCURRENCY = 6
MOST_FAILED = 0.05
SAY = "What does the sign say?"
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."
CORNERS = {"top left": "red circle", "top right": "blue square", "bottom left": "green triangle"}
# As many visual tokens a tile, of another size each.
OTHER = CheckpointShape(
    image_size=224,
    vision_hidden=64,
    vision_intermediate=128,
    vision_layers=2,
    vision_heads=4,
    hidden=96,
    intermediate=192,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab_size=TOKENIZER_SIZE,
)
QUESTIONS = (
    (user(image_part(sign("OPEN", TILED[3])), text_part(SAY)), "OPEN"),
    (user(image_part(sign("BANK", TILED[5])), text_part(SAY)), "BANK"),
    (
        user(
            image_part(sign("EXIT", TILED[3])),
            image_part(sign("CLOSED", TILED[1])),
            text_part("What does Image-2 say?"),
        ),
        "CLOSED",
    ),
    (user(image_part(things(CORNERS, TILED[5])), text_part("What is the color of the triangle?")), None),
    (
        user(*map(image_part, clip("red circle", "right")), text_part("Which way does the circle move?")),
        None,
    ),
)


@dataclass
class Site:
    """One language model, an encoder that is harmed, one that is not, and a liar in front of the latter."""

    victim: ServiceProcess
    survivor: ServiceProcess
    llm: ServiceProcess
    gateway: ServiceProcess

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"

    def descriptors(self) -> dict[str, int]:
        parts = {"llm": self.llm, "gateway": self.gateway, "survivor": self.survivor}
        return {name: len(os.listdir(f"/proc/{part.process.pid}/fd")) for name, part in parts.items()}

    def resident_mib(self) -> int:
        """Of the language model's front end."""
        status = Path(f"/proc/{self.llm.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) >> 10


@pytest.fixture
def site() -> Iterator[Site]:
    model = str(embedded_checkpoint())
    encoders = [ServiceProcess("encoder", model, "--port", "0", "--num-threads", "1") for _ in range(2)]
    liar = subprocess.Popen(
        [sys.executable, "-m", "tests.faulty_encoder", encoders[1].address, "7"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert liar.stdout is not None
    addresses = [*(encoder.address for encoder in encoders), liar.stdout.readline().split()[-1]]
    parts = [*encoders]
    try:
        llm = ServiceProcess("llm", model, "--port", "0", "--encoders", ",".join(addresses))
        parts.append(llm)
        wait_for_encoders(llm, len(addresses))
        gateway = ServiceProcess("gateway", "--port", "0", "--llm", llm.address)
        parts.append(gateway)
        yield Site(*encoders, llm, gateway)
    finally:
        for part in reversed(parts):
            part.resume()
            part.stop()
        liar.kill()
        liar.wait()
        liar.stdout.close()


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path, OTHER)


class Asking:
    """What came of the requests."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[tuple[str, str]] = []
        self.errors: list[str] = []

    async def ask(self, number: int, expected: list[str]) -> None:
        index = number % len(QUESTIONS)
        answer = await self.answer(QUESTIONS[index][0], salt=f"request {number}")
        if isinstance(answer, httpx.Response):
            self.outcomes[f"error {answer.status_code}"] += 1
            self.errors.append(answer.text)
        elif answer == expected[index]:
            self.outcomes["right"] += 1
        else:
            self.wrong.append((answer, expected[index]))

    async def answer(self, messages: object, salt: str) -> str | httpx.Response:
        """The text, or the response that has none; nothing is cached under a new salt."""
        body = {"messages": messages, "max_tokens": 24, "temperature": 0, "cache_salt": salt}
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return response
        return str(response.json()["choices"][0]["message"]["content"])


async def harm(
    victim: ServiceProcess, other_weights: Path, rng: random.Random, enough: asyncio.Event
) -> None:
    """Kill, stop and swap."""
    port = ("--port", str(victim.port))
    own = victim.arguments
    while not enough.is_set():
        await asyncio.sleep(rng.uniform(0.5, 1.5))
        match rng.choice(("kill", "stop", "other weights")):
            case "kill":
                victim.kill()
                await asyncio.to_thread(victim.start, *port)
            case "stop":
                victim.pause()
                await asyncio.sleep(rng.uniform(0.3, 2.5))
                victim.resume()
            case _:
                victim.kill()
                victim.arguments = (str(other_weights), *own[1:])
                await asyncio.to_thread(victim.start, *port)
                await asyncio.sleep(1.0)
                victim.kill()
                victim.arguments = own
                await asyncio.to_thread(victim.start, *port)


async def talk(asking: Asking, answers: list[object], enough: asyncio.Event) -> None:
    """Text alone, whom no encoder concerns."""
    while not enough.is_set():
        answers.append(await asking.answer(user(text_part("Hello!")), salt="text"))


async def test_right_answers_or_clear_errors(site: Site, other_weights: Path) -> None:
    async with httpx.AsyncClient(base_url=site.url, timeout=120) as client:
        asking = Asking(client)
        expected = []
        for number, (messages, known) in enumerate(QUESTIONS):
            answer = await asking.answer(messages, salt=f"before {number}")
            assert isinstance(answer, str) and known in (None, answer)
            expected.append(answer)
        descriptors, resident_mib = site.descriptors(), site.resident_mib()
        greetings: list[object] = []
        enough, limit = asyncio.Event(), asyncio.Semaphore(CONCURRENCY)

        async def ask_all() -> None:
            await asyncio.gather(*map(one, range(NUM_REQUESTS)))
            enough.set()

        async def one(number: int) -> None:
            async with limit:
                await asking.ask(number, expected)

        async with asyncio.TaskGroup() as group:
            group.create_task(harm(site.victim, other_weights, random.Random(3), enough))
            group.create_task(talk(asking, greetings, enough))
            group.create_task(ask_all())
        print(dict(asking.outcomes), len(greetings), "greetings")
        assert not asking.wrong
        assert asking.outcomes["right"] >= (1 - MOST_FAILED) * NUM_REQUESTS, asking.errors
        assert all('"error"' in error and "/somewhere" not in error for error in asking.errors)
        assert greetings and set(map(str, greetings)) == {GREETING}
        await until_nothing_is_left(site, descriptors)
        assert site.resident_mib() - resident_mib < 200


async def until_nothing_is_left(site: Site, before: dict[str, int]) -> None:
    await asyncio.to_thread(wait_idle, site.llm)
    assert not list(Path("/dev/shm").glob("tessera-*"))
    async with asyncio.timeout(20):
        while any(count > before[name] + 2 for name, count in site.descriptors().items()):
            await asyncio.sleep(0.2)
