"""A stand-in for `tessera`, run as a process: NAME [BEHAVIOUR...] as arguments.

Says that it is ready, writes what happens to it to the file in TESSERA_TEST_LOG, and misbehaves as told.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from deploy.service import follow_parent, ready_line

LOG = Path(os.environ["TESSERA_TEST_LOG"])


def log(text: str) -> None:
    with LOG.open("a") as file:
        file.write(f"{text}\n")


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if "unhealthy" in sys.argv else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    name, *behaviour = sys.argv[1:]
    assert behaviour.pop() == "--exit-with-parent"
    threading.Thread(target=follow_parent, daemon=True).start()
    log(f"{name} started {os.getpid()}")

    def on_term(*_: object) -> None:
        log(f"{name} asked to stop")
        if "stubborn" not in behaviour:
            time.sleep(0.05)
            log(f"{name} stopped")
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    print(f"{name} says hello", file=sys.stderr, flush=True)
    if "dies early" in behaviour:
        sys.exit("cannot listen on anything")
    if "child" in behaviour:
        grandchild = subprocess.Popen(["sleep", "600"])
        log(f"{name} has child {grandchild.pid}")
    server = HTTPServer(("127.0.0.1", 0), Ready)
    time.sleep(0.2 if name == "llm" else 0.05)
    print(ready_line(name, f"127.0.0.1:{server.server_port}"), flush=True)
    if "dies later" in behaviour:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    while True:
        server.handle_request()


main()
