"""Memory shared by real processes, one of which is killed or stopped: nothing stays, nothing is mixed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.embedded import embedded_checkpoint
from tests.pictures import image_part, text_part, user
from tests.processes import ServiceProcess, Stack
from tests.scenes import TILED, sign

SAY = "What does the sign say?"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    encoder = ("--tile-ring-mib", "4", "--metrics-port", "0")
    with Stack(embedded_checkpoint(), "--num-kv-blocks", "256", encoder_arguments=encoder) as running:
        yield running


@pytest.fixture(autouse=True)
def one_ring(stack: Stack) -> Iterator[None]:
    """Before and after every test; all its slots are free."""
    until(lambda: is_at_rest(stack))
    yield
    until(lambda: is_at_rest(stack))


def is_at_rest(stack: Stack) -> bool:
    return rings_of(stack.llm) == rings_of(stack.encoder) == 1 and slots_in_use(stack.encoder) == 0


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def rings_of(service: ServiceProcess) -> int:
    """That the process has mapped."""
    return Path(f"/proc/{service.process.pid}/maps").read_text().count("memfd:tessera-ring")


def slots_in_use(encoder: ServiceProcess) -> float:
    said = next(line for line in reversed(encoder.log) if "metrics on http://" in line)
    page = httpx.get(said.rpartition(" ")[2].strip()).text
    name = "tessera_encoder_ring_slots_in_use "
    return next(float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))


def ask(stack: Stack, word: str, **more: Any) -> httpx.Response:
    messages = user(image_part(sign(word, TILED[3])), text_part(SAY))
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, **more}
    return httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)


def answer(stack: Stack, word: str, **more: Any) -> str:
    response = ask(stack, word, **more)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_killed_encoder(stack: Stack) -> None:
    assert answer(stack, "OPEN") == "OPEN"
    stack.encoder.kill()
    until(lambda: rings_of(stack.llm) == 0)
    stack.restart_encoder()
    stack.wait_ready()
    assert answer(stack, "TAXI") == "TAXI"


def test_a_stopped_encoder_is_mapped_again_when_it_goes_on(stack: Stack) -> None:
    stack.encoder.pause()
    try:
        assert ask(stack, "EXIT").status_code == 503
        until(lambda: rings_of(stack.llm) == 0)
    finally:
        stack.encoder.resume()
    stack.wait_ready()
    until(lambda: rings_of(stack.llm) == 1)
    for word in ("EXIT", "BANK", "HOTEL"):
        assert answer(stack, word) == word


def test_a_killed_front_end(stack: Stack) -> None:
    assert answer(stack, "MUSEUM", cache_salt="a") == "MUSEUM"
    stack.llm.kill()
    until(lambda: slots_in_use(stack.encoder) == 0)
    stack.llm.start("--port", str(stack.llm.port))
    stack.wait_ready()
    assert answer(stack, "MUSEUM", cache_salt="b") == "MUSEUM"
