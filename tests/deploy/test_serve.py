"""`tessera serve`: its flags, and the whole thing for real with the embedded checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.cli import UsageError, add_common_arguments
from deploy.demo import PICTURE, QUESTIONS
from deploy.embedded import EMBEDDED_MODEL_NAME, EMBEDDED_MODEL_NOTE
from deploy.progress import Progress
from deploy.serve import ServeCommand, ServeFlags, make_supervisor
from tests.deploy.shown_answers import SHOWN_ANSWERS

TESSERA = (sys.executable, "-m", "deploy")
START_TIMEOUT_S = 120


def parse(*argv: str) -> tuple[ServeFlags, argparse.Namespace]:
    flags = ServeFlags.make()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for group in (flags.gateway, flags.llm, flags.llm_server, flags.encoder):
        group.add_to(parser, "group")  # argparse refuses two flags of one name
    arguments = parser.parse_args(argv)
    flags.share(arguments)
    return flags, arguments


def test_every_flag_reaches_its_service() -> None:
    argv = ["--port=1", "--max-num-seqs=2", "--llm-metrics-port=3", "--encoder-max-batch-tiles=4"]
    flags, arguments = parse(*argv, "--max-images=5", "--llm-max-images=6", "--no-enable-prefix-caching")
    assert flags.gateway.command_line(arguments) == ["--port=1", "--max-images=5"]
    assert flags.llm.command_line(arguments) == ["--max-num-seqs=2", "--no-enable-prefix-caching"]
    assert sorted(flags.llm_server.command_line(arguments)) == ["--max-images=6", "--metrics-port=3"]
    assert flags.encoder.command_line(arguments) == ["--max-batch-tiles=4"]


def test_what_is_said_of_the_model_holds_for_the_encoder_too() -> None:
    flags, arguments = parse("--dtype=float32", "--load-format=dummy", "--encoder-dtype=float16")
    assert sorted(flags.llm.command_line(arguments)) == ["--dtype=float32", "--load-format=dummy"]
    assert sorted(flags.encoder.command_line(arguments)) == ["--dtype=float16", "--load-format=dummy"]


def parts_of(*argv: str) -> dict[str, tuple[str, ...]]:
    command = ServeCommand()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_common_arguments(parser, command)
    supervisor, _ = make_supervisor(command.flags, parser.parse_args(argv), Progress(io.StringIO()))
    return {part.name: part.arguments for part in supervisor.parts}


def test_several_servers_share_an_engine_and_the_gateway_knows_all() -> None:
    parts = parts_of("--num-servers=3", "--llm-metrics-port=9100", "--gateway-workers=2", "--device=cpu")
    assert list(parts) == ["encoder", "llm", "llm-1", "llm-2", "gateway"]
    servers = [parts[name] for name in ("llm", "llm-1", "llm-2")]
    [sockets] = {tuple(flag for flag in server if flag.startswith("--engine-socket=")) for server in servers}
    assert len(sockets) == 1
    ports = [next(flag for flag in server if flag.startswith("--port=")) for server in servers]
    targets = ",".join(f"127.0.0.1:{port.removeprefix('--port=')}" for port in ports)
    assert f"--llm={targets}" in parts["gateway"] and "--gateway-workers=2" in parts["gateway"]
    metrics = [[flag for flag in server if flag.startswith("--metrics-port=")][-1] for server in servers]
    assert metrics == [f"--metrics-port={port}" for port in (9100, 9101, 9102)]


def test_on_the_cpu_there_is_one_of_each() -> None:
    parts = parts_of("--device=cpu")
    assert list(parts) == ["encoder", "llm", "gateway"]
    assert "--gateway-workers=1" in parts["gateway"]
    assert not any(flag.startswith("--engine-socket") for flag in parts["llm"])


def test_no_server_is_none() -> None:
    with pytest.raises(UsageError, match="--num-servers"):
        parts_of("--num-servers=0")


@pytest.mark.parametrize(
    "flag", ["--encoders", "--llm", "--encoder-tls-ca", "--llm-tls-ca", "--encoder-host"]
)
def test_what_serve_wires_itself_is_no_flag(flag: str) -> None:
    with pytest.raises(SystemExit):
        parse(flag, "x")


@dataclass
class Serving:
    """A running `tessera serve` and everything that it started."""

    process: subprocess.Popen[str]
    base_url: str

    def pids(self) -> list[int]:
        return sorted(descendants(self.process.pid))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.base_url.removesuffix("/v1") + path, timeout=10) as response:
            return str(response.read().decode())

    def chat(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [*TESSERA, "chat", "--base-url", self.base_url, "--max-tokens", "24", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)


def command_line(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""  # ended, or a zombie


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Serving]:
    command = [*TESSERA, "serve", "--port", "0", "--kv-cache-gib", "0.1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        first = process.stdout.readline()
        found = re.search(r"on (http://\S+/v1) after", first)
        assert found, first + process.stderr.read()
        yield Serving(process, found[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as running:
        yield running
        pids = running.pids()
        assert len(pids) >= 4  # encoder, llm, its engine, gateway
        running.process.send_signal(signal.SIGTERM)
        _, messages = running.process.communicate(timeout=60)
        assert running.process.returncode == 0, messages
        assert messages.splitlines()[-1] == "stopped"
        assert not [pid for pid in pids if command_line(pid)]


def test_it_is_ready_and_names_the_embedded_model(served: Serving) -> None:
    assert served.get("/ready")
    assert [model["id"] for model in json.loads(served.get("/v1/models"))["data"]] == [EMBEDDED_MODEL_NAME]


def test_chat_answers_one_question_about_a_picture(served: Serving) -> None:
    answer = served.chat(str(PICTURE), QUESTIONS[0])
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"{SHOWN_ANSWERS[0]}\n", "")


def test_chat_keeps_a_conversation_about_a_picture(served: Serving) -> None:
    typed = "\n".join(["Hello!", f"/image {PICTURE}", *QUESTIONS, "/quit"])
    answer = served.chat(stdin=typed)
    greeting, *answers = answer.stdout.splitlines()
    assert (answer.returncode, tuple(answers)) == (0, SHOWN_ANSWERS), (answer.stdout, answer.stderr)
    assert "demo model" in greeting and EMBEDDED_MODEL_NOTE in answer.stderr


def test_chat_tells_what_was_wrong_with_a_picture(served: Serving, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"this is text")
    answer = served.chat(str(tmp_path / "no.png"), "what is this?")
    assert answer.returncode == 1 and answer.stderr.splitlines()[-1].endswith("(HTTP 400)")


def test_an_encoder_that_was_killed_comes_back(served: Serving) -> None:
    (encoder,) = [pid for pid in served.pids() if " encoder " in command_line(pid)]
    os.kill(encoder, signal.SIGKILL)
    until(lambda: served.chat("no picture needed").returncode == 0, 10)
    until(lambda: served.chat(str(PICTURE), "and now?").returncode == 0, START_TIMEOUT_S)


@pytest.mark.parametrize("victim", [[], ["llm"]], ids=["the command itself", "the language model"])
def test_nothing_is_left_behind(victim: Sequence[str]) -> None:
    with serving() as running:
        pids = running.pids()
        if victim:
            (llm,) = [pid for pid in pids if " llm " in command_line(pid)]
            os.kill(llm, signal.SIGKILL)
            _, messages = running.process.communicate(timeout=60)
            assert running.process.returncode == 1
            assert "tessera serve: llm ended (signal SIGKILL)" in messages
        else:
            running.process.kill()
        until(lambda: not any(map(command_line, pids)), 60)


def test_a_checkpoint_that_cannot_be_served_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["InternVLChatModel"]}')
    command = [*TESSERA, "serve", str(tmp_path), "--port", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert finished.returncode == 1 and not finished.stdout
    assert re.search(r"(encoder|llm) ended \(exit code 1\)", finished.stderr)


def test_a_port_that_is_taken_ends_the_start_with_its_reason(served: Serving) -> None:
    port = served.base_url.rpartition(":")[2].removesuffix("/v1")
    command = [*TESSERA, "gateway", "--port", port]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert finished.returncode == 1
    assert port in finished.stderr and "Traceback" not in finished.stderr


def gateway_at(port: int, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*TESSERA, "gateway", "--host", "0.0.0.0", "--port", str(port), *argv]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, env=environment)


def test_a_gateway_that_others_can_reach_does_not_start_without_keys() -> None:
    finished = gateway_at(0)
    assert finished.returncode == 1 and "allow_no_keys" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_gateway_takes_its_keys_from_the_environment(served: Serving) -> None:
    finished = gateway_at(0, TESSERA_API_KEYS="too-short")
    assert finished.returncode == 1 and "fewer than 20 characters" in finished.stderr
    assert "too-short" not in finished.stderr
    taken = int(served.base_url.rpartition(":")[2].removesuffix("/v1"))
    assert "cannot listen" in gateway_at(taken, TESSERA_API_KEYS="k" * 30).stderr  # so the keys were good
