"""A real headless Chromium for tests, where one is installed."""

from __future__ import annotations

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root, as in containers, Chromium's own sandbox does not start; what it opens here is ours.
ARGUMENTS = ["--no-sandbox"]


def chromium() -> str:
    """Path of the program; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    return found
