"""A figure can be traced to hardware, versions and commit."""

from __future__ import annotations

from importlib import metadata

from deploy.bench.machine import describe


def test_it_says_where_and_with_what() -> None:
    facts = describe()
    assert facts["torch"] == metadata.version("torch") and int(facts["cores"]) > 0
    assert all(facts[name] for name in ("gpu", "processor", "python", "commit", "date"))


def test_the_commit_may_be_told() -> None:
    assert describe("abc1234")["commit"] == "abc1234"
