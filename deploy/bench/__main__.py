"""`python -m deploy.bench`: decode and transport, each against its yardstick in the same run."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from deploy.bench import decode, transport
from deploy.random_checkpoint import INTERNVIT_300M_QWEN3_600M, write_random_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="element types of the decode benchmark")
    parser.add_argument("--checkpoint", default="", help="folder to keep the random checkpoint in (1.9 GB)")
    arguments = parser.parse_args()
    print(_machine(arguments.threads))
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
        folder = Path(arguments.checkpoint or scratch)
        if not (folder / "config.json").is_file():
            print("writing a random checkpoint, InternViT-300M and Qwen3-0.6B in shape ...", flush=True)
            write_random_checkpoint(folder, INTERNVIT_300M_QWEN3_600M)
        kept = [transport.run(folder)]
        kept += [decode.run(folder, arguments.threads, dtype) for dtype in arguments.dtypes.split(",")]
    return 0 if all(kept) else 1


def _machine(num_threads: int) -> str:
    """Hardware, versions and commit, so that a figure can be traced."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").is_file()
        else iter(()),
        platform.processor() or platform.machine(),
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, {num_threads} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )


if __name__ == "__main__":
    sys.exit(main())
