"""Real service processes for tests: started, watched, killed and restarted by name."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import grpc
import httpx

from protos import language_model_pb2, language_model_pb2_grpc

START_TIMEOUT_S = 90.0


class ServiceProcess:
    """`python -m deploy NAME ...` in its own process group; `address` is known once it is ready."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self.arguments = arguments
        self.address = ""
        self.start()

    def start(self, *more: str) -> None:
        """Start (again); returns when the service says that it is ready."""
        command = [sys.executable, "-m", "deploy", self.name, *self.arguments, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.log: list[str] = []
        ready: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None and self.process.stderr is not None
        for stream in (self.process.stdout, self.process.stderr):
            threading.Thread(target=self._read, args=(stream, ready), daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.address_in(ready):
            assert self.process.poll() is None, f"{self.name} ended:\n" + "".join(self.log)
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n" + "".join(self.log)

    def address_in(self, ready: queue.Queue[str]) -> bool:
        try:
            self.address = ready.get(timeout=0.1)
        except queue.Empty:
            return False
        return True

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        """kill -9"""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _read(self, stream: object, ready: queue.Queue[str]) -> None:
        marker = f"tessera {self.name} ready on "
        for line in stream:  # type: ignore[attr-defined]
            self.log.append(line)
            if line.startswith(marker):
                ready.put(line.removeprefix(marker).strip())


def model_of(llm: ServiceProcess) -> language_model_pb2.GetLanguageModelResponse:
    """What an operator would ask it over gRPC."""
    with grpc.insecure_channel(llm.address) as channel:
        stub = language_model_pb2_grpc.LanguageModelStub(channel)
        return stub.GetModel(language_model_pb2.GetLanguageModelRequest(), timeout=5)


def wait_for_encoders(llm: ServiceProcess, count: int, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while model_of(llm).encoders_ready < count:
        assert time.monotonic() < deadline, "the language model does not find its encoders"
        time.sleep(0.05)


def load_of(llm: ServiceProcess) -> dict[str, float]:
    """Sequences and KV use."""
    model = model_of(llm)
    return {
        "running": model.sequences_running,
        "waiting": model.sequences_waiting,
        "kv": model.kv_cache_usage,
    }


def wait_idle(llm: ServiceProcess, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(value > 1e-6 for value in load_of(llm).values()):
        assert time.monotonic() < deadline, f"something is left: {load_of(llm)}"
        time.sleep(0.02)


class Stack:
    """Encoder, language model and gateway of one checkpoint, as processes on free ports."""

    def __init__(self, checkpoint: Path, *llm_arguments: str, encoder_arguments: Sequence[str] = ()) -> None:
        self.encoder = ServiceProcess("encoder", str(checkpoint), "--port", "0", *encoder_arguments)
        self.llm = ServiceProcess(
            "llm", str(checkpoint), "--port", "0", "--encoders", self.encoder.address, *llm_arguments
        )
        self.gateway = ServiceProcess("gateway", "--port", "0", "--llm", self.llm.address)
        self.url = f"http://{self.gateway.address}"
        self.wait_ready()

    def wait_ready(self, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < deadline, "the gateway does not become ready"
            time.sleep(0.05)

    def restart_encoder(self) -> None:
        """On the port it had."""
        self.encoder.start("--port", str(self.encoder.port))

    def __enter__(self) -> Stack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in (self.gateway, self.llm, self.encoder):
            service.resume()
            service.stop()
