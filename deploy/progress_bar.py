"""How far a long job is, as a line that is written over where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from deploy.progress import CLEAR_LINE

WIDTH = 30
MIN_INTERVAL_S = 0.1


class ProgressBar:
    """Silent where `out` is no terminal."""

    def __init__(self, total: int, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._out = out
        self._clock = clock
        self._start_s = clock()
        self._shown_s = -MIN_INTERVAL_S
        self._is_terminal = out.isatty()
        self.num_done = 0
        self.num_failed = 0

    def advance(self, has_failed: bool) -> None:
        self.num_done += 1
        self.num_failed += has_failed
        now_s = self._clock()
        if self._is_terminal and (now_s - self._shown_s >= MIN_INTERVAL_S or self.num_done == self._total):
            self._shown_s = now_s
            self._out.write(CLEAR_LINE + self.line())
            self._out.flush()

    def line(self) -> str:
        filled = WIDTH * self.num_done // max(self._total, 1)
        bar = "#" * filled + "-" * (WIDTH - filled)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        per_s = self.num_done / max(self._clock() - self._start_s, 1e-9)
        left_s = (self._total - self.num_done) / per_s if per_s else 0.0
        return f"[{bar}] {self.num_done}/{self._total}{failed}, {per_s:.1f}/s, {left_s:.0f} s left"

    def close(self) -> None:
        """The line is no longer written over."""
        if self._is_terminal and self.num_done:
            self._out.write("\n")
            self._out.flush()
