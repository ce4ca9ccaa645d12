"""The command line: what it accepts, what it refuses by name, what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deploy.cli import COMMANDS, main


def refuse(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed about a command line that is refused with exit code 2."""
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    return capsys.readouterr().err


def test_help_is_instant_because_it_imports_no_service() -> None:
    heavy = "{'torch', 'grpc', 'httpx', 'transformers'} & set(sys.modules)"
    code = f"import sys\nfrom deploy.cli import main\ntry: main(['--help'])\nfinally: assert not {heavy}"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert all(name in finished.stdout for name in COMMANDS)


def test_help_of_a_service_imports_no_torch() -> None:
    for name in COMMANDS:
        run = f"try: main(['{name}', '--help'])\nfinally: assert 'torch' not in sys.modules"
        code = f"import sys\nfrom deploy.cli import main\n{run}"
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("tessera ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["serv"], "invalid choice: 'serv'"),
        (["gateway", "--prot", "1"], "unrecognized arguments: --prot 1"),
        (["gateway", "--por", "1"], "unrecognized arguments: --por 1"),
        (["gateway", "--port", "http"], "argument --port: invalid int value: 'http'"),
        (["gateway", "--port", "70000"], "tessera gateway: error: --port must be 0..65535, got 70000"),
        (["encoder", "nowhere", "--max-batch-tiles", "-1"], "--max-batch-tiles must be >= 0, got -1"),
        (["encoder", "nowhere", "--tls-cert", "c"], "--tls-cert and --tls-key go together"),
        (["llm", "nowhere", "--max-num-seqs", "-1"], "--max-num-seqs must be >= 0, got -1"),
        (["llm", "nowhere", "--dtype", "int3"], "--dtype must be one of auto, float32"),
        (["serve", "nowhere", "--dtype", "int3"], "--dtype must be one of auto, float32"),
        (["serve", "nowhere", "--encoder-max-tiles", "0"], "--encoder-max-tiles must be >= 1, got 0"),
        (["serve", "./nowhere"], "'./nowhere' is neither a folder nor a hub id"),
        (["serve", "--encoders", "other:1"], "unrecognized arguments: --encoders"),
        (["chat", "no.png", "what?"], "no such file: no.png"),
        (["chat", "--log-level", "loud"], "invalid choice: 'loud'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_refused_by_name(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refuse(*argv, capsys=capsys)


def test_a_gateway_that_is_not_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--base-url", "http://127.0.0.1:9/v1", "hi"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tessera chat: no answer from http://127.0.0.1:9/v1/")
