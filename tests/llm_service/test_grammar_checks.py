"""Formats checked in real processes: what is refused, what is kept, and what a slow one does to others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from llm_service.grammar_checks import GrammarChecks
from llm_service.response_format import FormatKind, ResponseFormat
from protos.errors import InvalidRequest
from tests.llm_service.test_grammar import HOSTILE


def schema(value: object) -> ResponseFormat:
    return ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(value))


GOOD = schema({"type": "object", "properties": {"a": {"type": "string"}}})


@pytest.fixture
async def make_checks() -> AsyncIterator[Callable[..., GrammarChecks]]:
    made: list[GrammarChecks] = []

    def make(**options: float) -> GrammarChecks:
        made.append(GrammarChecks(strips_leading_space=False, num_workers=1, **options))
        return made[-1]

    yield make
    for checks in made:
        await checks.close()


async def test_a_good_format_becomes_a_grammar(make_checks: Callable[..., GrammarChecks]) -> None:
    checks = make_checks()
    assert (await checks.grammar(GOOD)).startswith("start: answer\nanswer: %json {")
    assert "/a+/" in await checks.grammar(ResponseFormat(FormatKind.REGEX, "a+"))


async def test_hostile_formats_are_refused(
    make_checks: Callable[..., GrammarChecks],
) -> None:
    checks = make_checks()
    await checks.grammar(GOOD)  # starts the process
    for name, hostile in HOSTILE.items():
        with pytest.raises(InvalidRequest) as refused:
            await checks.grammar(schema(hostile))
        assert refused.value.field == "response_format.json_schema", name
    with pytest.raises(InvalidRequest, match=r'not supported: \["not"\]'):
        await checks.grammar(schema(HOSTILE["unsupported keyword"]))
    with pytest.raises(InvalidRequest) as refused:
        await checks.grammar(ResponseFormat(FormatKind.REGEX, "(a"))
    assert refused.value.field == "response_format.regex"
    assert await checks.grammar(GOOD)


async def test_what_takes_too_long_is_refused_and_its_process_replaced(
    make_checks: Callable[..., GrammarChecks],
) -> None:
    checks = make_checks(cpu_s=0.1)
    for kind in ("boolean", "null"):
        assert await checks.grammar(schema({"type": kind}))
        [process] = [worker._process for worker in checks._workers]
        with pytest.raises(InvalidRequest, match="too complex"):
            await checks.grammar(schema(HOSTILE["thousands of optional properties"]))
        assert process is not None and process.returncode == -signal.SIGPROF


async def test_one_that_does_not_answer_is_not_waited_for_for_long(
    make_checks: Callable[..., GrammarChecks],
) -> None:
    checks = make_checks(cpu_s=0.1)
    assert await checks.grammar(GOOD)
    [process] = [worker._process for worker in checks._workers]
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match="too complex"):
        await checks.grammar(schema({"type": "null"}))
    assert await checks.grammar(schema({"type": "null"}))


async def test_a_caller_that_leaves_does_not_give_its_answer_to_the_next(
    make_checks: Callable[..., GrammarChecks],
) -> None:
    checks = make_checks()
    await checks.grammar(GOOD)
    leaving = asyncio.create_task(checks.grammar(schema(HOSTILE["thousands of optional properties"])))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert await checks.grammar(schema({"type": "boolean"}))


async def test_the_second_check_of_a_format_asks_nobody(make_checks: Callable[..., GrammarChecks]) -> None:
    checks = make_checks()
    with pytest.raises(InvalidRequest):
        await checks.grammar(schema({"type": "strng"}))
    await checks.grammar(GOOD)
    await checks.close()
    assert await checks.grammar(GOOD)
    with pytest.raises(InvalidRequest):
        await checks.grammar(schema({"type": "strng"}))
    assert all(worker._process is None for worker in checks._workers)


def test_a_process_that_died_unnoticed_is_replaced() -> None:
    """In the event loop that serves; it learns of the death only when it runs again."""

    async def ask_twice(is_noticed: bool) -> None:
        checks = GrammarChecks(strips_leading_space=False, num_workers=1)
        try:
            await checks.grammar(ResponseFormat(FormatKind.REGEX, "a"))
            [process] = [worker._process for worker in checks._workers]
            assert process is not None and process.stdin is not None
            if is_noticed:
                process.stdin.close()
            else:
                os.kill(process.pid, signal.SIGKILL)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert await checks.grammar(ResponseFormat(FormatKind.REGEX, "b"))
        finally:
            await checks.close()

    uvloop.run(ask_twice(is_noticed=False))
    uvloop.run(ask_twice(is_noticed=True))
