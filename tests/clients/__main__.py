"""`make clients`: real clients ask the running gateway, each in an environment of its own.

Environments are made once and kept in `.venv-clients`; the gateway is `tessera serve` with the demo model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clients.checks import SIGN, Report
from tests.scenes import sign, things

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
PIP = ("pip", "install", "--quiet", "--disable-pip-version-check")
INSTALL_TIMEOUT_S = 900
CHECKS_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
CORNERS = {
    "top left": "red circle",
    "top right": "blue square",
    "bottom left": "green triangle",
    "bottom right": "yellow star",
}
# What clients look up beside the address they are given would reach beyond this machine.
SETTINGS = {
    "ANONYMIZED_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
KEPT = ("HOME", "LANG", "PATH", "TMPDIR")  # a key or a proxy of the caller's decides nothing


@dataclass(frozen=True)
class Client:
    name: str  # of its distribution
    extras: str = ""
    more: tuple[str, ...] = ()  # what it imports without asking for it

    @property
    def requirements(self) -> tuple[str, ...]:
        return (self.name + self.extras, *self.more)

    @property
    def script(self) -> str:
        return "tests.clients.with_" + self.name.replace("-", "_")

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python"


CLIENTS = (
    Client("openai"),
    Client("anthropic"),
    Client("langchain-openai"),
    Client("litellm", more=("mcp",)),
    Client("llama-index-llms-openai-like"),
    Client("instructor"),
    Client("pydantic-ai-slim", "[openai]"),
    Client("openai-agents"),
)


class Failed(Exception):
    """A client could not be installed or did not report."""


def install(client: Client) -> None:
    """Once: an environment that is whole says what was installed.  Raises Failed."""
    folder = ENVIRONMENTS / client.name
    done, wanted = folder / ".installed", " ".join(client.requirements)
    if done.exists() and done.read_text() == wanted:
        return
    print(f"installing {wanted} (once)", file=sys.stderr, flush=True)
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    _call([str(client.python), "-m", *PIP, *client.requirements])
    done.write_text(wanted)


def _call(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if result.returncode:
        raise Failed(result.stderr or result.stdout)


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """(URL, model) of a gateway before the demo model, on a free port of loopback."""
    command = [sys.executable, "-m", "deploy", "serve", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        # "serving MODEL on URL/v1 after ..."
        words = process.stdout.readline().split()
        if len(words) < 4:
            raise Failed("tessera serve did not start")
        yield words[3].removesuffix("/v1"), words[1]
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def draw(folder: Path) -> None:
    """What checks.py asks about."""
    (folder / "things.png").write_bytes(things(CORNERS))
    (folder / "sign.png").write_bytes(sign(SIGN))


def ask(client: Client, url: str, model: str, pictures: Path) -> Report:
    """Run the client's script in its environment.  Raises Failed."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | SETTINGS
    command = [str(client.python), "-m", client.script, url, model, str(pictures)]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHECKS_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no report within {CHECKS_TIMEOUT_S} s") from None
    try:
        return Report(**json.loads(result.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise Failed(result.stderr or result.stdout) from None


def row(client: Client, outcome: Report | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"{client.name:<30}{'':<10}{'':>8}{'':>9}   FAILED"
    count = len(outcome.passed) + len(outcome.failed)
    checks = f"{len(outcome.passed)}/{count}"
    result = "FAILED" if outcome.failed else "passed"
    return f"{client.name:<30}{outcome.version:<10}{checks:>8}{outcome.seconds:>8.1f}s   {result}"


def complaints(client: Client, outcome: Report | Failed) -> list[str]:
    """What is printed below the table; nothing where all is well."""
    if isinstance(outcome, Failed):
        return [f"{client.name}: {outcome}"]
    return [f"{client.name}, {check}:\n{trace}" for check, trace in outcome.failed.items()]


def outcome_of(client: Client, url: str, model: str, pictures: Path) -> Report | Failed:
    try:
        install(client)
        return ask(client, url, model, pictures)
    except Failed as failure:
        return failure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CLIENT", help="only these (default: all)")
    names = parser.parse_args(argv).names or [client.name for client in CLIENTS]
    if unknown := set(names) - {client.name for client in CLIENTS}:
        parser.error(f"unknown clients: {', '.join(sorted(unknown))}")
    below: list[str] = []
    with tempfile.TemporaryDirectory() as folder, serving() as (url, model):
        draw(Path(folder))
        print(f"{'client':<30}{'version':<10}{'checks':>8}{'time':>9}   result", flush=True)
        for client in (client for client in CLIENTS if client.name in names):
            outcome = outcome_of(client, url, model, Path(folder))
            print(row(client, outcome), flush=True)
            below += complaints(client, outcome)
    print(*below, sep="\n", file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    raise SystemExit(main())
