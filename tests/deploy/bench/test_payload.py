"""8-bit visual tokens are compared through the real services."""

from __future__ import annotations

import re

import pytest

from deploy.bench import payload


def test_tokens_and_answers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    payload.run(num_questions=1)  # at least one of each kind
    out = capsys.readouterr().out
    error = float(re.findall(r"mean relative error ([0-9.]+) %", out)[0])
    assert 0.5 < error < 5
    same, own, close = (float(figure) for figure in re.findall(r"([0-9.]+) %", out)[1:4])
    assert same > 50 and own > 50 and close > 50
