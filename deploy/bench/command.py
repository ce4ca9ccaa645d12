"""`tessera bench`: parts of the system on this machine, each against its yardstick."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from deploy.bench.machine import processor
from deploy.cli import UsageError

PARTS = ("transport", "decode", "front-end", "overlap", "gateway", "payload")
DEFAULT_PARTS = PARTS[:5]
NEED_CHECKPOINT = frozenset({"transport", "decode", "front-end"})
DTYPES = ("bfloat16", "float32")


class BenchCommand:
    log_level = "warning"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--threads",
            type=int,
            default=os.cpu_count(),
            help="CPU threads of the decode (default: %(default)s)",
        )
        parser.add_argument(
            "--dtypes", default=",".join(DTYPES), help="element types of the decode (default: %(default)s)"
        )
        parser.add_argument(
            "--parts",
            default=",".join(DEFAULT_PARTS),
            help=f"what is measured, of {', '.join(PARTS)} (default: %(default)s)",
        )
        parser.add_argument(
            "--front-ends",
            default="1:1",
            metavar="SERVERS:WORKERS",
            help="language-model services and gateway workers of the part front-end (default: %(default)s)",
        )
        parser.add_argument(
            "--checkpoint", default="", help="folder that keeps the random checkpoint, 1.9 GB (default: none)"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """0 when every ratio reaches what the project promises."""
        dtypes = [dtype for dtype in arguments.dtypes.split(",") if dtype]
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise UsageError(f"argument --dtypes: {dtype!r} is none of {', '.join(DTYPES)}")
        parts = arguments.parts.split(",")
        for part in parts:
            if part not in PARTS:
                raise UsageError(f"argument --parts: {part!r} is none of {', '.join(PARTS)}")
        if re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments.front_ends) is None:
            raise UsageError(f"argument --front-ends: {arguments.front_ends!r} is not like 2:4")
        from deploy.bench import decode, front_end, gateway_cost, overlap, payload, transport
        from deploy.embedded import embedded_checkpoint
        from deploy.random_checkpoint import INTERNVIT_300M_QWEN3_600M, write_random_checkpoint

        print(_machine(arguments.threads))
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
            folder = Path(arguments.checkpoint or scratch)
            if not NEED_CHECKPOINT.isdisjoint(parts) and not (folder / "config.json").is_file():
                print("writing a random checkpoint, InternViT-300M and Qwen3-0.6B in shape ...", flush=True)
                write_random_checkpoint(folder, INTERNVIT_300M_QWEN3_600M)
            reached = []
            if "transport" in parts:
                reached.append(transport.run(folder))
            if "decode" in parts:
                reached += [decode.run(folder, arguments.threads, dtype) for dtype in dtypes]
            if "front-end" in parts:
                servers, _, workers = arguments.front_ends.partition(":")
                reached.append(front_end.run(folder, num_servers=int(servers), num_workers=int(workers)))
            if "overlap" in parts:
                reached.append(overlap.run_on_cores(Path(scratch) / "overlap"))
            if "gateway" in parts:
                reached.append(gateway_cost.run(embedded_checkpoint()))
            if "payload" in parts:
                reached.append(payload.run())
        return 0 if all(reached) else 1


def _machine(num_threads: int) -> str:
    """Hardware, versions and commit, so that a figure can be traced."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "grpcio"))
    return (
        f"{processor()}, {os.cpu_count()} cores, {num_threads} threads; Python {platform.python_version()}, "
        f"{versions}; commit {commit.stdout.strip() or 'unknown'}"
    )
