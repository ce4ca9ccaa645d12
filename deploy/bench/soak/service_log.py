"""The log lines of the services: shown unless bad input asked for them, kept where one tells of an error."""

from __future__ import annotations

import re
import sys

from deploy.progress import Progress

SERIOUS = re.compile(r" (ERROR|CRITICAL) |^Traceback |ended \((exit code|signal)")
EXPECTED = re.compile(r"Invalid HTTP request received")
MAX_KEPT = 200


class ServiceLog(Progress):
    """A supervisor says to it what its children write."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.serious: list[str] = []
        self.is_stopping = False

    def log_line(self, name: str, line: str) -> None:
        if self.is_stopping or EXPECTED.search(line):
            return
        if SERIOUS.search(line) and len(self.serious) < MAX_KEPT:
            self.serious.append(f"{name}: {line}")
        super().log_line(name, line)
