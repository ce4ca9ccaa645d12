"""One service in this process: `tessera encoder`, `tessera llm`, `tessera gateway`.

Calls the `serve` of the service and nothing else of it; tells a parent when it is ready and
ends with the parent.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import uvloop

from deploy.cli import UsageError
from deploy.embedded import EMBEDDED_MODEL_NAME, EMBEDDED_MODEL_NOTE, embedded_checkpoint
from deploy.flags import ConfigFlags
from protos.errors import ServingError
from protos.malloc import tune_malloc

# After the parent's death: more than any service takes to drain.
ORPHAN_GRACE_S = 40.0

log = logging.getLogger(__name__)

# Keys that callers of the gateway must have; only their hashes go further.
API_KEYS_VARIABLE = "TESSERA_API_KEYS"

Serve = Callable[[Any, Callable[[int], None]], Awaitable[None]]


@dataclass(frozen=True)
class ServiceCommand:
    name: str
    flags: ConfigFlags[Any]
    load_serve: Callable[[], Serve]  # imports what the service needs, torch included
    host_of: Callable[[Any], str]
    has_model: bool
    log_level: str = "info"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        if self.has_model:
            add_model_argument(parser)
        parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
        self.flags.add_to(parser, self.name)

    def run(self, arguments: argparse.Namespace) -> int:
        if arguments.exit_with_parent:
            threading.Thread(target=follow_parent, daemon=True).start()
        tune_malloc()
        config = self._config(arguments)
        serve = self.load_serve()

        def on_ready(port: int) -> None:
            print(ready_line(self.name, f"{self.host_of(config)}:{port}"), flush=True)

        try:
            uvloop.run(serve(config, on_ready))  # type: ignore[arg-type]
        # An address in use, a checkpoint that cannot be served, an engine that ended.
        except (OSError, ValueError, ServingError) as error:
            log.debug("stopped by", exc_info=True)
            log.error("%s", error)
            return 1
        return 0

    def _config(self, arguments: argparse.Namespace) -> Any:
        fields = {field.path[0] for field in self.flags.flags} | {"model"}
        try:
            values = resolve_model(arguments) if self.has_model else {}
            if self.has_model and arguments.model is None:
                log.info(EMBEDDED_MODEL_NOTE)
            return self.flags.config(
                arguments, **{name: value for name, value in values.items() if name in fields}
            )
        except ValueError as error:
            raise UsageError(str(error)) from error


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint: a folder or a hub id (default: Tessera's own demo model)",
    )


def resolve_model(arguments: argparse.Namespace) -> dict[str, str]:
    """Config fields that MODEL decides: the embedded checkpoint and its name where none is given.

    Raises:
        CheckpointError: the embedded checkpoint lacks weights.
    """
    if arguments.model is not None:
        return {"model": arguments.model}
    values = {"model": str(embedded_checkpoint())}
    if not hasattr(arguments, "served_model_name"):
        values["served_model_name"] = EMBEDDED_MODEL_NAME
    return values


def ready_line(name: str, address: str) -> str:
    """What a service prints when it accepts requests; `deploy.supervisor` reads it."""
    return f"tessera {name} ready on {address}"


def follow_parent() -> None:
    """End this process group when stdin ends: the parent holds the other end, however it dies.

    A pipe is noticed on every Unix, and `kill -9` of the parent closes it, too.
    """
    while os.read(0, 1024):
        pass
    log.warning("parent has gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.killpg(0, signal.SIGKILL)


def encoder_command() -> ServiceCommand:
    from encoder_service.config import EncoderConfig

    def load_serve() -> Serve:
        from encoder_service.process import serve

        return serve

    flags = ConfigFlags(EncoderConfig, omit=("model",), defaults={"port": 50051})
    return ServiceCommand("encoder", flags, load_serve, lambda config: config.server.host, has_model=True)


def llm_command() -> ServiceCommand:
    from llm_service.config import LLMConfig

    def load_serve() -> Serve:
        from llm_service.process import serve

        return serve

    flags = ConfigFlags(LLMConfig, omit=("model",), defaults={"port": 50052})
    return ServiceCommand("llm", flags, load_serve, lambda config: config.server.host, has_model=True)


def gateway_command() -> ServiceCommand:
    from gateway.config import GatewayConfig

    def load_serve() -> Serve:
        from gateway.api_keys import hash_keys
        from gateway.app import serve

        async def serve_with_keys(config: GatewayConfig, on_ready: Callable[[int], None]) -> None:
            hashes = hash_keys(os.environ.get(API_KEYS_VARIABLE, ""))
            access = replace(config.access, api_key_hashes=(*config.access.api_key_hashes, *hashes))
            await serve(replace(config, access=access), on_ready)

        return serve_with_keys

    flags = ConfigFlags(GatewayConfig, defaults={"port": 8000})
    return ServiceCommand("gateway", flags, load_serve, lambda config: config.host, has_model=False)
