"""Lines that show what is being waited for; a spinner too where there is a terminal."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import TextIO

SPINNER = "|/-\\"
FRAME_S = 0.1
CLEAR_LINE = "\r\x1b[K"


class Step:
    """One thing being waited for."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name = name
        self._progress = progress
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def done(self, result: str) -> None:
        self._progress.say(f"{self.name:<13} ready after {self.elapsed_s:4.1f} s   {result}")


class Progress:
    """Whole lines from several tasks or threads, never mixed with the spinner."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._steps: list[Step] = []
        self._lock = threading.Lock()
        self._is_terminal = out.isatty()
        self._spinning = False

    def say(self, text: str) -> None:
        with self._lock:
            if self._is_terminal:
                self._out.write(CLEAR_LINE)
            print(text, file=self._out, flush=True)

    def log_line(self, name: str, line: str) -> None:
        self.say(f"{name:<7} | {line}")

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[Step]:
        step = Step(name, self)
        with self._lock:
            self._steps.append(step)
            if self._is_terminal and not self._spinning:
                self._spinning = True
                threading.Thread(target=self._spin, daemon=True).start()
        try:
            yield step
        finally:
            with self._lock:
                self._steps.remove(step)

    def _spin(self) -> None:
        for frame in itertools.cycle(SPINNER):
            with self._lock:
                self._out.write(CLEAR_LINE)
                self._spinning = bool(self._steps)
                if self._spinning:
                    waits = ", ".join(f"{step.name} {step.elapsed_s:.0f} s" for step in self._steps)
                    self._out.write(f"{frame} waiting for {waits}")
                self._out.flush()
                if not self._spinning:
                    return
            time.sleep(FRAME_S)
