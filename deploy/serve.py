"""`tessera serve`: encoder, language model and gateway on this machine, wired over loopback."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.cli import UsageError
from deploy.embedded import EMBEDDED_MODEL_NOTE
from deploy.flags import ConfigFlags
from deploy.progress import Progress
from deploy.service import add_model_argument, resolve_model
from deploy.supervisor import Part, PartFailed, Supervisor, free_ports, reachable, run_until_stopped
from encoder_service.config import EncoderConfig
from gateway.config import GatewayConfig
from llm_service.config import LLMConfig
from protos.checkpoint import CheckpointError, open_checkpoint

LOOPBACK = "127.0.0.1"
# Of a gRPC service that only this machine reaches: nothing of where it listens or how it is secured.
SERVER_FLAGS = ("host", "tls-cert", "tls-key", "tls-client-ca")
# On top of what services give their running requests.
STOP_MARGIN_S = 5.0
# Of the gateway: each writes some 30,000 tokens a second.
MAX_WORKERS = 4


@dataclass(frozen=True)
class ServeFlags:
    """Flags of all three: the gateway's and the model's by their own names, the rest behind prefixes."""

    encoder: ConfigFlags[EncoderConfig]
    llm_server: ConfigFlags[LLMConfig]
    llm: ConfigFlags[LLMConfig]
    gateway: ConfigFlags[GatewayConfig]

    @classmethod
    def make(cls) -> ServeFlags:
        gateway = ConfigFlags(GatewayConfig, omit=_names(GatewayConfig, "llm", "llm_tls"))
        wired = {*SERVER_FLAGS, *_names(LLMConfig, "model", "encoders", "encoder_tls")}
        prefixed = _names(LLMConfig, "server") | {flag.name for flag in gateway.flags}
        llm = ConfigFlags(LLMConfig, omit=(prefixed & _names(LLMConfig)) | wired)
        return cls(
            encoder=ConfigFlags(
                EncoderConfig, prefix="encoder-", omit=("model", *SERVER_FLAGS), defaults={"port": 0}
            ),
            llm_server=ConfigFlags(
                LLMConfig, prefix="llm-", omit={flag.name for flag in llm.flags} | wired, defaults={"port": 0}
            ),
            llm=llm,
            gateway=gateway,
        )

    def share(self, arguments: argparse.Namespace) -> None:
        """What is said of the model (--dtype, --device) holds for the encoder unless it is told otherwise."""
        for flag in {flag.name for flag in self.llm.flags} & {flag.name for flag in self.encoder.flags}:
            name = flag.replace("-", "_")
            if hasattr(arguments, name) and not hasattr(arguments, f"encoder_{name}"):
                setattr(arguments, f"encoder_{name}", getattr(arguments, name))

    def check(self, arguments: argparse.Namespace) -> GatewayConfig:
        """Raises UsageError for what a service would refuse after a long start."""
        try:
            self.llm.config(arguments, model="checked")
            self.llm_server.config(arguments, model="checked")
            self.encoder.config(arguments, model="checked")
            return self.gateway.config(arguments)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _names(config_type: type[Any], *fields: str) -> set[str]:
    """Names of the flags below these fields; of all flags where no field is named."""
    flags = ConfigFlags(config_type).flags
    return {flag.name for flag in flags if not fields or not set(fields).isdisjoint(flag.path)}


class ServeCommand:
    log_level = "warning"

    def __init__(self) -> None:
        self.flags = ServeFlags.make()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_argument(parser)
        parser.add_argument(
            "--num-servers",
            type=int,
            default=1,
            metavar="INT",
            help="language-model services in front of the one engine (default: %(default)s)",
        )
        self.flags.gateway.add_to(parser, "gateway")
        self.flags.llm.add_to(parser, "language model (what the encoder has too holds for both)")
        self.flags.llm_server.add_to(parser, "language-model service")
        self.flags.encoder.add_to(parser, "encoder")

    def run(self, arguments: argparse.Namespace) -> int:
        start = time.monotonic()
        progress = Progress(sys.stderr)
        supervisor, model = make_supervisor(self.flags, arguments, progress)

        def on_ready(address: str) -> None:
            url = f"{supervisor.scheme}://{reachable(address)}/v1"
            print(_welcome(model, url, time.monotonic() - start), flush=True)

        try:
            asyncio.run(run_until_stopped(supervisor, on_ready))
        except PartFailed as error:
            progress.say(f"tessera serve: {error}")
            return 1
        progress.say("stopped")
        return 0


def make_supervisor(
    flags: ServeFlags, arguments: argparse.Namespace, progress: Progress
) -> tuple[Supervisor, str]:
    """The supervisor of parsed arguments and the name under which the model is served.

    Raises:
        UsageError: the arguments or the checkpoint cannot be served.
    """
    flags.share(arguments)
    gateway = flags.check(arguments)
    try:
        values = resolve_model(arguments)
        # Fetched once and here, where its progress bar has the terminal.
        folder = str(open_checkpoint(values["model"]).folder)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    if arguments.model is None:
        progress.say(f"note: {EMBEDDED_MODEL_NOTE}")
    name = getattr(arguments, "served_model_name", "") or values.get("served_model_name", values["model"])
    num_servers = getattr(arguments, "num_servers", 1)
    if num_servers < 1:
        raise UsageError(f"argument --num-servers: must be >= 1, got {num_servers}")
    encoder_port, *llm_ports = free_ports(1 + num_servers)
    encoder_port = getattr(arguments, "encoder_port", 0) or encoder_port
    llm_ports[0] = getattr(arguments, "llm_port", 0) or llm_ports[0]
    level = f"--log-level={arguments.log_level}"
    llm_flags = [
        *(folder, level, *flags.llm.command_line(arguments), *flags.llm_server.command_line(arguments)),
        *(f"--served-model-name={name}", f"--encoders={LOOPBACK}:{encoder_port}"),
    ]
    if num_servers > 1 and not getattr(arguments, "engine_socket", ""):
        llm_flags.append(f"--engine-socket={_engine_socket()}")
    targets = ",".join(f"{LOOPBACK}:{port}" for port in llm_ports)
    gateway_flags = flags.gateway.command_line(arguments)
    if not hasattr(arguments, "gateway_workers"):
        gateway_flags.append(f"--gateway-workers={_default_workers(arguments)}")
    parts = (
        _part("encoder", folder, level, *flags.encoder.command_line(arguments), f"--port={encoder_port}"),
        _part("llm", *llm_flags, f"--port={llm_ports[0]}"),
        _part("gateway", level, *gateway_flags, f"--llm={targets}"),
    )
    joining = [
        Part(f"llm-{number}", ("llm", *llm_flags, f"--port={port}", *_metrics_port(arguments, number)))
        for number, port in enumerate(llm_ports[1:], 1)
    ]
    grace_s = gateway.shutdown_grace_s + STOP_MARGIN_S
    supervisor = Supervisor(
        *parts,
        progress,
        grace_s,
        joining=joining,
        in_turn=_on_gpu(arguments),
        scheme="https" if gateway.tls_cert else "http",
    )
    return supervisor, name


def _part(name: str, *arguments: str) -> Part:
    return Part(name, (name, *arguments))


def _metrics_port(arguments: argparse.Namespace, number: int) -> list[str]:
    """The first service has the port that was asked for, the others those behind it."""
    first = getattr(arguments, "llm_metrics_port", 0)
    return [f"--metrics-port={first + number}"] if first > 0 else []


def _engine_socket() -> Path:
    folder = tempfile.mkdtemp(prefix="tessera-serve-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "engine.sock"


def _default_workers(arguments: argparse.Namespace) -> int:
    """One on the CPU, where cores are the model's; with a GPU enough for what it writes."""
    return min(max((os.cpu_count() or 1) // 4, 1), MAX_WORKERS) if _on_gpu(arguments) else 1


def _on_gpu(arguments: argparse.Namespace) -> bool:
    device = getattr(arguments, "device", "auto")
    return device == "cuda" or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def _welcome(model: str, url: str, elapsed_s: float) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return "\n".join(
        [
            f"serving {model} on {url} after {elapsed_s:.1f} s; Ctrl-C stops",
            f"  in a browser: {url.removesuffix('v1')}",
            f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            f"  tessera chat --base-url {url} PICTURE 'What is in the picture?'",
        ]
    )
