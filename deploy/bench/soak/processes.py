"""Memory, descriptors and threads of the processes below one, as Linux tells them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What stands on a command line -> what the process is called here.
NAMES = {
    "llm_service.engine_process": "engine",
    "encoder_service.decoder_process": "decoders",
    "encoder": "encoder",
    "llm": "llm",
    "gateway": "gateway",
}


@dataclass(frozen=True)
class Usage:
    """Of one process, or of all of one name."""

    pids: tuple[int, ...]
    rss: int  # bytes
    fds: int
    threads: int


def usages(root: int) -> dict[str, Usage]:
    """By name, of what `root` has started and what that has."""
    found: dict[str, Usage] = {}
    for pid in _descendants(root):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            name, usage = _name_of(pid), _usage_of(pid)
            if name is not None:
                found[name] = _sum(found[name], usage) if name in found else usage
    return found


def _descendants(root: int) -> Iterator[int]:
    for task in Path(f"/proc/{root}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            for pid in map(int, (task / "children").read_text().split()):
                yield pid
                with suppress(FileNotFoundError):
                    yield from _descendants(pid)


def _name_of(pid: int) -> str | None:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return next((name for word, name in NAMES.items() if word in words), None)


def _usage_of(pid: int) -> Usage:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    rss = int(status.get("VmRSS", "0 kB").split()[0]) * 1024
    return Usage((pid,), rss, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


def _sum(one: Usage, other: Usage) -> Usage:
    pids = tuple(sorted(one.pids + other.pids))
    return Usage(pids, one.rss + other.rss, one.fds + other.fds, one.threads + other.threads)
