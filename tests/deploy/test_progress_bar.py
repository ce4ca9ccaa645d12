"""A line that shows how far a job is."""

from __future__ import annotations

import io

from deploy.progress import CLEAR_LINE
from deploy.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_tells_what_is_done_how_fast_and_what_is_left() -> None:
    times = iter([0.0, 1.0, 2.0, 2.0])
    bar = ProgressBar(10, Terminal(), lambda: next(times))
    bar.advance(False)
    # The line asks for the time once more.
    assert bar.num_done == 1
    assert bar.line() == "[###---------------------------] 1/10, 0.5/s, 18 s left"


def test_failures_are_counted_and_the_last_line_stays() -> None:
    out = Terminal()
    bar = ProgressBar(2, out, lambda: 5.0)
    bar.advance(False)
    bar.advance(True)
    bar.close()
    last = out.getvalue().split(CLEAR_LINE)[-1]
    assert last.startswith(f"[{'#' * 30}] 2/2, 1 failed, ") and last.endswith("\n")


def test_it_is_silent_where_nobody_looks() -> None:
    out = io.StringIO()
    bar = ProgressBar(1, out)
    bar.advance(False)
    bar.close()
    assert out.getvalue() == ""
