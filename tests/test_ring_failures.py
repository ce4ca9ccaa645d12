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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rings")


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[Stack]:
    ring = ("--tile-ring-dir", str(folder))
    llm = ("--num-kv-blocks", "256", "--tile-ring-mib", "4", *ring)
    with Stack(embedded_checkpoint(), *llm, encoder_arguments=ring) as running:
        yield running


@pytest.fixture(autouse=True)
def one_ring_without_a_name(stack: Stack, folder: Path) -> Iterator[None]:
    """Before and after every test."""
    until(lambda: rings_of(stack.llm) == rings_of(stack.encoder) == 1)
    assert list(folder.iterdir()) == []
    yield
    until(lambda: rings_of(stack.llm) == rings_of(stack.encoder) == 1)
    assert list(folder.iterdir()) == []


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def rings_of(service: ServiceProcess) -> int:
    """That the process has mapped."""
    return Path(f"/proc/{service.process.pid}/maps").read_text().count("tessera-ring-")


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


def test_a_stopped_encoder_has_nobody_s_memory_when_it_goes_on(stack: Stack) -> None:
    """What it still writes goes into a ring that only itself has mapped."""
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
    until(lambda: rings_of(stack.encoder) == 0)
    stack.llm.start("--port", str(stack.llm.port))
    stack.wait_ready()
    assert answer(stack, "MUSEUM", cache_salt="b") == "MUSEUM"
