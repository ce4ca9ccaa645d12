from __future__ import annotations

import os
import subprocess
import sys

from deploy.bench.soak.processes import usages

ENGINE = "import sys; print('ready', flush=True); sys.stdin.read()"
GATEWAY = """
import subprocess, sys
held = [open("/dev/null") for _ in range(2)]
command = [sys.executable, "-c", sys.argv[2], "llm_service.engine_process"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
child.communicate()
"""


def test_children_and_their_children_are_found_by_name() -> None:
    command = [sys.executable, "-c", GATEWAY, "gateway", ENGINE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        found = usages(os.getpid())
        process.communicate()
    gateway, engine = found["gateway"], found["engine"]
    assert gateway.pids == (process.pid,) and engine.pids != gateway.pids
    assert gateway.fds == engine.fds + 4  # two files and two pipes
    assert engine.threads == 1 and engine.rss > 1 << 20
    assert "gateway" not in usages(os.getpid())
