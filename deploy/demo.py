"""`make demo`: the three services answer questions about the bundled picture, and the times are printed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from deploy.cli import UsageError, add_common_arguments
from deploy.completions import CompletionError, Completions, Message, user_message
from deploy.progress import Progress
from deploy.serve import ServeCommand, make_supervisor
from deploy.supervisor import PartFailed, Supervisor

# One conversation about one picture.
PICTURE = Path(__file__).parent / "pictures" / "cafe.jpg"
QUESTIONS = (
    "What does the sign say?",
    "How much is the coffee?",
    "What number is on the door?",
)

SHOWN_PICTURE = PICTURE.relative_to(PICTURE.parents[2])
MAX_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """A streamed answer; times in seconds from sending the request."""

    text: str
    first_token_s: float
    total_s: float
    usage: dict[str, Any]  # as in the API

    @property
    def prompt_details(self) -> dict[str, Any]:
        return self.usage.get("prompt_tokens_details") or {}


def ask(client: Completions, model: str, messages: Sequence[Message], out: TextIO) -> Answer:
    """Stream a greedy answer to `out`.  Raises CompletionError."""
    start = time.perf_counter()
    text, usage = "", None
    first_token_s = 0.0
    for piece in client.stream(model, messages, max_tokens=MAX_TOKENS, temperature=0):
        if piece.text and not text:
            first_token_s = time.perf_counter() - start
        text += piece.text
        print(piece.text, end="", file=out, flush=True)
        usage = piece.usage or usage
    total_s = time.perf_counter() - start
    if not text or usage is None:
        raise CompletionError("the answer was empty")
    return Answer(text, first_token_s, total_s, usage)


def converse(base_url: str, out: TextIO) -> list[Answer]:
    """Ask every question in one conversation; the picture goes with the first.  Raises CompletionError."""
    messages: list[Message] = []
    answers: list[Answer] = []
    with contextlib.closing(Completions(base_url)) as client:
        model = client.models()[0]
        print(f"\npicture   {SHOWN_PICTURE}", file=out)
        for question in QUESTIONS:
            messages.append(user_message(question, [] if answers else [PICTURE]))
            print(f"question  {question}\nanswer    ", end="", file=out, flush=True)
            answers.append(ask(client, model, messages, out))
            print(file=out)
            messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def table(answers: Sequence[Answer]) -> list[str]:
    """What each answer took, a column for each."""
    rows = {
        "question": range(1, len(answers) + 1),
        "first token, ms": [round(answer.first_token_s * 1000) for answer in answers],
        "whole answer, ms": [round(answer.total_s * 1000) for answer in answers],
        "prompt tokens": [answer.usage["prompt_tokens"] for answer in answers],
        "  visual": [answer.prompt_details.get("image_tokens", 0) for answer in answers],
        "  cached": [answer.prompt_details.get("cached_tokens", 0) for answer in answers],
        "answer tokens": [answer.usage["completion_tokens"] for answer in answers],
    }
    return [f"{name:<18}" + "".join(f"{number:>8}" for number in row) for name, row in rows.items()]


async def demonstrate(supervisor: Supervisor) -> list[Answer]:
    """Start, ask, stop.  Raises PartFailed or CompletionError."""
    try:
        address = await supervisor.start()
        return await asyncio.to_thread(converse, f"http://{address}/v1", sys.stdout)
    finally:
        await supervisor.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Takes what `tessera serve` takes; the gateway's port is a free one unless given."""
    command = ServeCommand()
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__, allow_abbrev=False)
    add_common_arguments(parser, command)
    arguments = parser.parse_args(argv)
    arguments.port = getattr(arguments, "port", 0)
    progress = Progress(sys.stderr)
    try:
        supervisor, _ = make_supervisor(command.flags, arguments, progress)
        answers = asyncio.run(demonstrate(supervisor))
    except UsageError as error:
        parser.error(str(error))
    except (PartFailed, CompletionError) as error:
        progress.say(f"demo failed: {error}")
        return 1
    print("", *table(answers), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
