"""The processes of a benchmark, by name: started, told, listened to, timed, ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from deploy.supervisor import READY_LINE

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
END_TIMEOUT_S = 30.0


class ChildProcesses:
    """Each is a module of ours that ends when its stdin does.  CPU times are those of /proc: Linux only."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, module: str, *arguments: str) -> None:
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def start_service(self, name: str, service: str, *arguments: str) -> str:
        """`tessera SERVICE ...`, quiet and on a port of its own; returns its address once it is ready.

        Raises:
            RuntimeError: it did not start.
        """
        self.start(name, "deploy", service, *arguments, "--port=0", "--log-level=error", "--exit-with-parent")
        found = READY_LINE.fullmatch(self.read_line(name))
        if found is None:
            raise RuntimeError(f"{name} did not start; see its message above")
        return found[2]

    def write_line(self, name: str, line: str) -> None:
        stdin = self._processes[name].stdin
        assert stdin is not None
        print(line, file=stdin, flush=True)

    def read_line(self, name: str) -> str:
        stdout = self._processes[name].stdout
        assert stdout is not None
        return stdout.readline().strip()

    def cpu_s(self) -> dict[str, float]:
        return {name: _cpu_s(process.pid) for name, process in self._processes.items()}

    def close(self) -> None:
        for process in reversed(self._processes.values()):
            assert process.stdin is not None
            process.stdin.close()
            process.wait(END_TIMEOUT_S)


def answer_of(module: str, question: str) -> str:
    """What a module prints that reads its settings from stdin and ends.

    Raises:
        RuntimeError: it failed; its message is what it said.
    """
    command = [sys.executable, "-m", module]
    client = subprocess.run(command, input=question, capture_output=True, text=True)
    if client.returncode:
        raise RuntimeError(client.stderr)
    return client.stdout


def _cpu_s(pid: int) -> float:
    """User and system time of a process and of its living children, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    children = [
        int(child)
        for tasks in Path(f"/proc/{pid}/task").iterdir()
        for child in (tasks / "children").read_text().split()
    ]
    return own + sum(map(_cpu_s, children))
