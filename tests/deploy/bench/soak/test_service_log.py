from __future__ import annotations

import pytest

from deploy.bench.soak.service_log import ServiceLog

HEAD = "2026-01-01 00:00:00,000"


@pytest.mark.parametrize(
    "line",
    [
        f"{HEAD} ERROR   gateway.chat: unexpected error in a stream",
        f"{HEAD} CRITICAL llm_service.process: gone",
        "Traceback (most recent call last):",
    ],
)
def test_errors_are_kept(line: str) -> None:
    log = ServiceLog()
    log.log_line("gateway", line)
    assert log.serious == [f"gateway: {line}"]


def test_warnings_are_shown_but_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    log = ServiceLog()
    log.log_line("llm", f"{HEAD} WARNING llm_service.encoder_pool: encoder does not answer")
    log.log_line("gateway", f"{HEAD} WARNING uvicorn.error: Invalid HTTP request received.")
    assert log.serious == []
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_said_while_stopping_is_no_matter() -> None:
    log = ServiceLog()
    log.is_stopping = True
    log.log_line("gateway", f"{HEAD} ERROR   x: broken off")
    assert log.serious == []
