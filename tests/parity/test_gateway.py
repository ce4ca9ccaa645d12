"""The same text through the OpenAI API, with encoder, llm and gateway as the programs that users start."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.parity.conftest import Model, Models
from tests.parity.local_pair import NUM_TOKENS
from tests.parity.scenarios import SCENARIOS, Scenario
from tests.parity.services import START_TIMEOUT_S
from tests.parity.test_inputs import all_scenarios

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
READY = re.compile(r"tessera \w+ ready on (\S+)")


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[str]:
    """One `tessera` service on a free port; yields its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy", *arguments, "--port=0", "--log-level=warning"),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        ready = READY.search(line.decode())
        assert ready is not None, f"tessera {arguments[0]} did not start"
        yield ready.group(1)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture(scope="module")
def served(models: Models) -> Model:
    return models("llama", "chat")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(served: Model) -> AsyncIterator[AsyncOpenAI]:
    folder = str(served.folder)
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(program("encoder", folder, "--device=cpu"))
        llm = await stack.enter_async_context(
            program("llm", folder, f"--encoders={encoder}", "--device=cpu", "--kv-cache-gib=0.01")
        )
        gateway = await stack.enter_async_context(program("gateway", f"--llm={llm}"))
        yield await stack.enter_async_context(
            AsyncOpenAI(base_url=f"http://{gateway}/v1", api_key="none", max_retries=0, timeout=60)
        )


async def ask(client: AsyncOpenAI, served: Model, scenario: Scenario) -> str:
    """The whole text; usage is checked on the way."""
    completion = await client.chat.completions.create(
        model=str(served.folder),
        messages=scenario.openai_messages(),
        max_completion_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(served.reference.input(scenario).token_ids)
    assert completion.usage.completion_tokens == NUM_TOKENS
    assert completion.choices[0].finish_reason == "length"
    return completion.choices[0].message.content or ""


def expected_text(served: Model, scenario: Scenario) -> str:
    text: str = served.reference.tokenizer.decode(served.reference.tokens(scenario, NUM_TOKENS))
    return text


@all_scenarios
async def test_alone(client: AsyncOpenAI, served: Model, scenario: Scenario) -> None:
    assert await ask(client, served, scenario) == expected_text(served, scenario)


async def test_batched_with_all_others(client: AsyncOpenAI, served: Model) -> None:
    texts = await asyncio.gather(*(ask(client, served, scenario) for scenario in SCENARIOS))
    assert texts == [expected_text(served, scenario) for scenario in SCENARIOS]


@all_scenarios
async def test_streamed(client: AsyncOpenAI, served: Model, scenario: Scenario) -> None:
    stream = await client.chat.completions.create(
        model=str(served.folder),
        messages=scenario.openai_messages(),
        max_completion_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == expected_text(served, scenario)
