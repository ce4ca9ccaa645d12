"""Whole lines on any output; a spinner on a terminal alone."""

from __future__ import annotations

import io
import os
import pty
import re
import time

from deploy.progress import Progress


def test_without_a_terminal_there_are_only_whole_lines() -> None:
    out = io.StringIO()
    progress = Progress(out)
    with progress.waiting("encoder") as step:
        progress.log_line("encoder", "loading")
        step.done("127.0.0.1:1")
    lines = out.getvalue().splitlines()
    assert lines[0] == "encoder | loading"
    assert re.fullmatch(r"encoder +ready after +0\.\d s +127\.0\.0\.1:1", lines[1])
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_terminal_shows_what_is_waited_for_until_it_is_there() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        progress = Progress(terminal)
        with progress.waiting("encoder"), progress.waiting("llm"):
            time.sleep(0.3)
            progress.say("a line")
        time.sleep(0.3)
        shown = os.read(master, 1 << 16).decode()
        with progress.waiting("gateway"):
            time.sleep(0.25)
        time.sleep(0.3)
        again = os.read(master, 1 << 16).decode()
    os.close(master)
    assert " waiting for encoder 0 s, llm 0 s" in shown
    assert "\r\x1b[Ka line\r\n" in shown
    assert shown.endswith("\r\x1b[K")
    assert "waiting for gateway 0 s" in again
