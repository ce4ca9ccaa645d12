"""One of several gateway processes: `python -m gateway.worker`.

Reads its settings as one JSON line from stdin and keeps stdin open: when it ends, so does the worker.  Prints
"ready" when it listens.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvloop

from gateway.access_config import AccessConfig
from gateway.app import serve_on
from gateway.config import GatewayConfig
from gateway.worker_pages import WorkerPages
from gateway.workers import READY_LINE
from protos.channel import ClientTlsConfig
from protos.malloc import tune_malloc


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    logging.basicConfig(
        level=settings["log_level"],
        format=f"%(asctime)s %(levelname)-7s %(name)s [{settings['index']}]: %(message)s",
        stream=sys.stderr,
    )
    threading.Thread(target=_follow_parent, daemon=True).start()
    tune_malloc()
    config = _config(settings["config"])
    pages = WorkerPages(Path(settings["folder"]), settings["index"], config.gateway_workers)
    listener = socket.socket(fileno=settings["listener"])
    uvloop.run(serve_on(listener, config, _say_ready, pages))


def _config(values: dict[str, Any]) -> GatewayConfig:
    tls = ClientTlsConfig(**values["llm_tls"])
    access: dict[str, Any] = {
        name: tuple(it) if isinstance(it, list) else it for name, it in values["access"].items()
    }
    nested = {"llm_tls": tls, "access": AccessConfig(**access)}
    return GatewayConfig(**{**values, **nested, "llm": tuple(values["llm"])})


def _say_ready(_port: int) -> None:
    sys.stdout.write(READY_LINE.decode())
    sys.stdout.flush()


def _follow_parent() -> None:
    """The parent holds the other end of stdin for life, however it ends."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
