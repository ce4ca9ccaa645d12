"""Whether a grammar can be enforced, found out before the engine sees it, in processes with a deadline."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from llm_service.call_form import CallForm
from llm_service.response_format import ResponseFormat, grammar_text
from llm_service.tools import ToolUse, with_thought
from protos.errors import InvalidRequest, Overloaded

CHECK_CPU_S = 0.5  # of the process: a busy machine is not the schema's fault
WAIT_FACTOR = 10  # for so many times as long its answer is waited for
START_TIMEOUT_S = 30.0  # of a worker that imports its library on a busy machine
START_ATTEMPTS = 3
QUEUE_TIMEOUT_S = 5.0
NUM_WORKERS = 2
MAX_KEPT = 256
_LINE_LIMIT = 1 << 20
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")

log = logging.getLogger(__name__)


class _Worker:
    """One process; started when first needed, and again after it was killed or has died."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, text: str) -> str | None:
        """What is wrong with the grammar, None if nothing.

        Raises:
            TimeoutError, EOFError, OSError: it took too long, or ended the process.
        """
        is_used = self._is_running
        await self.start()
        try:
            return await self._ask_in_time(text)
        except TimeoutError:
            raise
        except (EOFError, OSError):
            if not is_used:
                raise
        await self.start()  # it may have died since the last check, for which this text is not to blame
        return await self._ask_in_time(text)

    async def _ask_in_time(self, text: str) -> str | None:
        try:
            return await asyncio.wait_for(self._ask(text), WAIT_FACTOR * self._cpu_s)
        except BaseException:  # also cancelled: its answer would be taken for the next one's
            await self.close()
            raise

    @property
    def _is_running(self) -> bool:
        """As far as is known."""
        return self._process is not None and self._process.returncode is None

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def start(self) -> None:
        for attempt in range(START_ATTEMPTS):
            if self._is_running:
                return
            try:
                await self._start()
            except EOFError:  # on a busy machine uvloop has closed a new process's stdin now and then
                if attempt == START_ATTEMPTS - 1:
                    raise

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "llm_service.grammar_worker",
            str(self._cpu_s),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for us
        )
        try:
            await asyncio.wait_for(self._ask('start: "a"\n'), START_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise

    async def _ask(self, text: str) -> str | None:
        assert self._process is not None and self._process.stdin and self._process.stdout
        if self._process.stdin.is_closing():  # uvloop raises RuntimeError from a write then
            raise EOFError
        self._process.stdin.write(json.dumps(text).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise TimeoutError if await self._process.wait() == -signal.SIGPROF else EOFError
        answer: str | None = json.loads(line)
        return answer


class GrammarChecks:
    """Turns formats into grammars that the engine can build; what was found out once is kept."""

    def __init__(
        self, strips_leading_space: bool, num_workers: int = NUM_WORKERS, cpu_s: float = CHECK_CPU_S
    ) -> None:
        """`cpu_s` is the CPU time that a check may take."""
        self._strips_leading_space = strips_leading_space
        self._workers = [_Worker(cpu_s) for _ in range(num_workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self._kept: OrderedDict[str, str | None] = OrderedDict()

    async def grammar(self, form: ResponseFormat, may_think: bool = False) -> str:
        """
        Raises:
            InvalidRequest: names the format's field.
            Overloaded: too many others are being checked.
        """
        text = grammar_text(with_thought(form.rule(), may_think), self._strips_leading_space)
        return await self._enforceable(text, form.refusal)

    async def call_grammar(self, use: ToolUse, form: CallForm, may_think: bool = False) -> str:
        """The same for calls that must come; "" where they need not."""
        rule = use.rule(may_think, form)
        if not rule:
            return ""
        # No space is dropped behind a special token.
        strips_space = self._strips_leading_space and not form.tokens
        return await self._enforceable(grammar_text(rule, strips_space), use.refusal)

    async def _enforceable(self, text: str, refusal: Callable[[str], InvalidRequest]) -> str:
        problem = await self._problem(text)
        if problem is None:
            return text
        log.info("refused a grammar: %s", problem[:500])
        unsupported = _UNSUPPORTED.search(problem)
        if unsupported:
            raise refusal(f"uses keywords that are not supported: {unsupported.group(1)}")
        raise refusal("is invalid, unsupported or too complex to be enforced")

    async def start(self) -> None:
        """Without it, the first format waits for its process to start."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def close(self) -> None:
        for worker in self._workers:
            await worker.close()

    async def _problem(self, text: str) -> str | None:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        try:
            worker = await asyncio.wait_for(self._idle.get(), QUEUE_TIMEOUT_S)
        except TimeoutError:
            raise Overloaded("too many response formats are being checked", retry_after_s=1.0) from None
        try:
            problem = self._kept[text] = await worker.check(text)
        except (TimeoutError, EOFError, OSError):
            return "it took too long"  # which is not kept: the machine may have been busy
        finally:
            self._idle.put_nowait(worker)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return problem
