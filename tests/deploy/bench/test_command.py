"""`tessera bench` refuses what it cannot measure."""

from __future__ import annotations

import pytest

from deploy.cli import main


def test_an_unknown_dtype_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--dtypes", "int3"]) == 2
    assert "--dtypes" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--parts", "brakes"), ("--front-ends", "0:1")])
def test_what_cannot_be_measured_is_refused_by_name(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", flag, value]) == 2
    assert flag in capsys.readouterr().err
