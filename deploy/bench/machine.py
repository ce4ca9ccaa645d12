"""What a figure was measured on: hardware, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

GPU_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
PACKAGES = ("torch", "triton", "transformers", "grpcio", "uvloop")
ROOT = Path(__file__).parents[2]


def describe(commit: str = "") -> dict[str, str]:
    """Facts by name; `commit` is told where the tree is a copy without git."""
    gpus = _output(GPU_QUERY).splitlines()
    name, driver, memory = (gpus[0].split(", ") + ["", ""])[:3] if gpus else ("no GPU", "", "")
    facts = {
        "gpu": f"{len(gpus)}x {name}" if len(gpus) > 1 else name,
        "driver": driver,
        "gpu_memory": memory,
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    installed = {found.metadata["Name"].lower() for found in metadata.distributions()}
    return facts | {package: metadata.version(package) for package in PACKAGES if package in installed}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Short hash of the tree, with what says that it was changed."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = commit and _output(["git", "-C", str(ROOT), "status", "--porcelain"])
    return f"{commit}+changes" if changed else commit or "unknown"


def _output(command: list[str]) -> str:
    """What the command prints; nothing where it is not there or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""
