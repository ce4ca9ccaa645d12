"""A service command around a `serve` that a test scripts; real services are in test_serve.py."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.cli import UsageError
from deploy.embedded import embedded_checkpoint
from deploy.flags import ConfigFlags
from deploy.service import (
    Serve,
    ServiceCommand,
    encoder_command,
    gateway_command,
    llm_command,
    ready_line,
    resolve_model,
)
from deploy.supervisor import READY_LINE
from protos.errors import Unavailable

FOLLOW = "from deploy.service import follow_parent; print('follows', flush=True); follow_parent()"


@dataclass(frozen=True)
class Config:
    host: str = field(default="127.0.0.1", metadata={"help": "address"})
    port: int = field(default=0, metadata={"help": "port"})

    def __post_init__(self) -> None:
        if self.port < 0:
            raise ValueError(f"port must be >= 0, got {self.port}")


def command_of(serve: Serve) -> ServiceCommand:
    flags = ConfigFlags(Config, defaults={"port": 7})
    return ServiceCommand("scripted", flags, lambda: serve, lambda config: config.host, has_model=False)


def run(command: ServiceCommand, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


@pytest.mark.parametrize(("argv", "port"), [([], 7), (["--port", "9"], 9)])
def test_a_service_is_ready_on_the_port_it_says_and_ends_with_zero(
    argv: list[str], port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[Config] = []

    async def serve(config: Config, on_ready: Callable[[int], None]) -> None:
        configs.append(config)
        on_ready(4711)

    assert run(command_of(serve), *argv) == 0
    assert configs == [Config(port=port)]
    assert capsys.readouterr().out == "tessera scripted ready on 127.0.0.1:4711\n"


@pytest.mark.parametrize(
    "error", [OSError("cannot listen on x"), ValueError("no such tensor"), Unavailable("the engine ended")]
)
def test_what_an_operator_can_cause_is_one_line_and_exit_code_one(
    error: Exception, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(config: Config, on_ready: Callable[[int], None]) -> None:
        raise error

    assert run(command_of(serve)) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [str(error)]
    assert capsys.readouterr().out == ""


def test_a_bug_is_not_mistaken_for_a_fault_of_the_operator() -> None:
    async def serve(config: Config, on_ready: Callable[[int], None]) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(command_of(serve))


def test_a_value_that_the_config_refuses_is_wrong_usage_and_nothing_is_served() -> None:
    async def serve(config: Config, on_ready: Callable[[int], None]) -> None:
        raise AssertionError("must not run")

    with pytest.raises(UsageError, match="--port must be >= 0, got -1"):
        run(command_of(serve), "--port=-1")


def test_the_supervisor_reads_the_ready_line() -> None:
    match = READY_LINE.fullmatch(ready_line("llm", "[::1]:50052"))
    assert match is not None and match.groups() == ("llm", "[::1]:50052")


@pytest.mark.parametrize(
    ("given", "served"), [({}, {"served_model_name": "tessera-demo"}), ({"served_model_name": "mine"}, {})]
)
def test_without_a_model_the_embedded_one_is_served_unless_named_otherwise(
    given: dict[str, str], served: dict[str, str]
) -> None:
    values = resolve_model(argparse.Namespace(model=None, **given))
    assert values == {"model": str(embedded_checkpoint()), **served}


def test_a_model_that_is_given_keeps_its_own_name() -> None:
    assert resolve_model(argparse.Namespace(model="org/name")) == {"model": "org/name"}


@pytest.mark.parametrize(
    ("make", "port"), [(encoder_command, 50051), (llm_command, 50052), (gateway_command, 8000)]
)
def test_every_service_has_its_port_and_says_its_host(make: Callable[[], ServiceCommand], port: int) -> None:
    command = make()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--host", "0.0.0.0", *(["org/name"] if command.has_model else [])])
    given: dict[str, Any] = resolve_model(arguments) if command.has_model else {}
    config = command.flags.config(arguments, **given)
    assert command.host_of(config) == "0.0.0.0"
    assert (config.server.port if command.has_model else config.port) == port
    assert getattr(config, "model", None) == ("org/name" if command.has_model else None)


def test_the_end_of_stdin_and_nothing_else_on_it_ends_a_child() -> None:
    command = [sys.executable, "-c", FOLLOW]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, bufsize=0, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"follows\n"
        process.stdin.write(b"x" * 5000)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.stdin.close()
        assert process.wait(5) == -signal.SIGTERM
