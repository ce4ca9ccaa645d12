"""How the checks of real clients are run and told; `make clients` runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.clients.__main__ import CLIENTS, Client, Failed, complaints, row
from tests.clients.checks import Report, Server, examine

SERVER = Server("http://127.0.0.1:1", "demo", Path())


def passes(server: Server) -> None:
    assert server.openai_url == "http://127.0.0.1:1/v1"


async def fails_later(server: Server) -> None:
    raise ValueError(f"{server.model} is wrong")


def test_a_failed_check_does_not_stop_those_behind_it() -> None:
    report = examine((fails_later, passes), SERVER, "1.0")
    assert report.passed == ("passes",) and list(report.failed) == ["fails_later"]
    assert "demo is wrong" in report.failed["fails_later"]


def test_what_failed_is_named_below_the_table() -> None:
    client, report = Client("openai"), examine((fails_later, passes), SERVER, "1.0")
    assert row(client, report).split()[:3] == ["openai", "1.0", "1/2"] and row(client, report).endswith(
        "FAILED"
    )
    (complaint,) = complaints(client, report)
    assert complaint.startswith("openai, fails_later:")
    assert complaints(client, Failed("no such package")) == ["openai: no such package"]


def test_all_that_passed_leaves_nothing_to_say() -> None:
    report = Report("1.0", ("chat",), {}, 1.5)
    assert row(Client("openai"), report).endswith("passed") and not complaints(Client("openai"), report)


def test_every_client_has_its_script() -> None:
    assert all(importlib.util.find_spec(client.script) for client in CLIENTS)
