"""Processes of a benchmark start, say what is wrong with them, and end."""

from __future__ import annotations

from contextlib import closing

import pytest

from deploy.bench.child_processes import ChildProcesses, answer_of


def test_a_child_answers_uses_cpu_time_and_ends_with_its_stdin() -> None:
    with closing(ChildProcesses()) as children:
        children.start("bare", "deploy.bench.bare_route")
        assert int(children.read_line("bare")) > 0
        assert children.cpu_s()["bare"] > 0


def test_a_service_that_does_not_start_is_named() -> None:
    with closing(ChildProcesses()) as children, pytest.raises(RuntimeError, match="gateway did not start"):
        children.start_service("gateway", "gateway", "--max-images=0")


def test_a_client_that_fails_is_reported_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        answer_of("deploy.bench.picture_load", "no JSON")
