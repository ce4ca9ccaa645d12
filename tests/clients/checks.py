"""What the clients are asked about, and how a script of checks tells what came of them.

Standard library only: each script runs in an environment that holds one client and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The demo model is certain of these; things.png is what tests/clients/__main__.py draws.
COLOR_QUESTION, COLOR = "What color is the star?", "yellow"
PLACE_QUESTION, PLACE = "Where is the star?", "bottom right"
COUNT_QUESTION, COUNT = "How many objects are there?", "4"
SIGN_QUESTION, SIGN = "What does the sign say?", "OPEN"
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."
COLORS = ("red", "green", "blue", "yellow")
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Server:
    """The running gateway."""

    url: str
    model: str
    pictures: Path  # folder with things.png and sign.png

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def picture(self, name: str) -> bytes:
        return (self.pictures / name).read_bytes()

    def base64(self, name: str) -> str:
        return base64.b64encode(self.picture(name)).decode()

    def data_uri(self, name: str) -> str:
        return f"data:image/png;base64,{self.base64(name)}"


Check = Callable[[Server], Any]  # may be a coroutine function; fails by raising


@dataclass(frozen=True)
class Report:
    version: str  # of the client
    passed: tuple[str, ...]
    failed: dict[str, str]  # check -> traceback
    seconds: float


def examine(checks: Sequence[Check], server: Server, client_version: str) -> Report:
    """Every check is run, whatever became of the one before."""
    start = time.monotonic()
    passed, failed = [], {}
    for check in checks:
        try:
            outcome = check(server)
            if inspect.isawaitable(outcome):
                asyncio.run(_finish(outcome))
        except Exception:
            failed[check.__name__] = traceback.format_exc()
        else:
            passed.append(check.__name__)
    return Report(client_version, tuple(passed), failed, time.monotonic() - start)


async def _finish(outcome: Any) -> None:
    await asyncio.wait_for(outcome, TIMEOUT_S)


def main(distribution: str, checks: Sequence[Check]) -> int:
    """Of a script: URL, MODEL and PICTURES are its arguments; its last line is the report as JSON."""
    url, model, pictures = sys.argv[1:]
    report = examine(checks, Server(url, model, Path(pictures)), version(distribution))
    print(json.dumps(vars(report)), flush=True)
    return 1 if report.failed else 0
