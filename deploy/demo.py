"""`make demo`: the three services answer a question about the bundled picture, and the times are printed."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from deploy.cli import UsageError, add_common_arguments
from deploy.completions import CompletionError, Completions, user_message
from deploy.progress import Progress
from deploy.serve import ServeCommand, make_supervisor
from deploy.service import EMBEDDED_MODEL_NAME
from deploy.supervisor import PartFailed, Supervisor
from deploy.tiny_checkpoint import NOISE_NOTICE

PICTURE = Path(__file__).parent / "pictures" / "cafe.jpg"
SHOWN_PICTURE = PICTURE.relative_to(PICTURE.parents[2])
QUESTION = "What does the sign say, and what does a coffee cost?"
MAX_TOKENS = 64


@dataclass
class Measurement:
    """Times of one streamed answer, in seconds from sending the request."""

    start: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        assert self.first_token_s is not None
        details = self.usage.get("prompt_tokens_details") or {}
        completion = self.usage["completion_tokens"]
        speed = (completion - 1) / (self.total_s - self.first_token_s)
        images = details.get("image_tokens")
        return [
            f"time to first token  {self.first_token_s * 1000:.0f} ms",
            f"decoding             {speed:.0f} tokens/s",
            f"prompt               {self.usage['prompt_tokens']} tokens, {images} of them visual",
            f"answer               {completion} tokens",
        ]


def ask(base_url: str, out: TextIO) -> Measurement:
    """Stream the answer to `out`.  Raises CompletionError."""
    client = Completions(base_url)
    try:
        model = client.models()[0]
        measurement = Measurement()
        question = user_message(QUESTION, [PICTURE])
        for piece in client.stream(model, [question], max_tokens=MAX_TOKENS):
            if piece.text and measurement.first_token_s is None:
                measurement.first_token_s = time.perf_counter() - measurement.start
            out.write(piece.text)
            out.flush()
            measurement.usage = piece.usage or measurement.usage
        measurement.total_s = time.perf_counter() - measurement.start
    finally:
        client.close()
    if measurement.first_token_s is None or not measurement.usage:
        raise CompletionError("the answer was empty")
    return measurement


async def demonstrate(supervisor: Supervisor) -> Measurement:
    """Start, ask, stop.  Raises PartFailed or CompletionError."""
    try:
        address = await supervisor.start()
        print(f"\npicture   {SHOWN_PICTURE}\nquestion  {QUESTION}\nanswer    ", end="", flush=True)
        measurement = await asyncio.to_thread(ask, f"http://{address}/v1", sys.stdout)
        print("\n", flush=True)
        return measurement
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
        supervisor, model = make_supervisor(command.flags, arguments, progress)
        measurement = asyncio.run(demonstrate(supervisor))
    except UsageError as error:
        parser.error(str(error))
    except (PartFailed, CompletionError) as error:
        progress.say(f"demo failed: {error}")
        return 1
    print("\n".join(measurement.lines()))
    if model == EMBEDDED_MODEL_NAME:
        print(f"note                 {NOISE_NOTICE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
