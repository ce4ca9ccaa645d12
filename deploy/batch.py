"""`tessera batch`: a file of requests to a running gateway, a file of results, as often as it takes."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import TextIO

from deploy.api_key import add_key_arguments, api_key_of
from deploy.batch_file import BatchFileError, BatchInput, BatchOutput, BatchResult
from deploy.batch_runner import BatchRunner, GatewayLost
from deploy.cli import UsageError
from deploy.progress_bar import ProgressBar

GO_ON = "run the same command again to go on"


class BatchCommand:
    log_level = "warning"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "input", type=Path, metavar="IN", help="requests in OpenAI's batch format (JSONL)"
        )
        parser.add_argument(
            "output",
            type=Path,
            metavar="OUT",
            help="results, one a line, as they come; requests whose custom_id it has are skipped",
        )
        parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
        add_key_arguments(parser)
        parser.add_argument(
            "--concurrency",
            type=int,
            default=16,
            metavar="INT",
            help="requests at a time (%(default)s)",
        )
        parser.add_argument(
            "--max-attempts",
            type=int,
            default=8,
            metavar="INT",
            help="attempts of a request while the gateway is full or away (%(default)s)",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        for name in ("concurrency", "max_attempts"):
            if getattr(arguments, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        try:
            return run_batch(make_runner(arguments), arguments.input, arguments.output, sys.stderr)
        except (BatchFileError, GatewayLost, OSError) as error:
            hint = f"; {GO_ON}" if isinstance(error, GatewayLost) else ""
            print(f"tessera batch: {error}{hint}", file=sys.stderr)
            return 1


def make_runner(arguments: argparse.Namespace) -> BatchRunner:
    """Raises OSError when the key cannot be read."""
    return BatchRunner(
        arguments.base_url,
        concurrency=arguments.concurrency,
        max_attempts=arguments.max_attempts,
        api_key=api_key_of(arguments, os.environ),
    )


def run_batch(runner: BatchRunner, source: Path, target: Path, out: TextIO) -> int:
    """Ask what `target` has no result of; returns the exit code.

    Requests that the server refused have a result, too: they are told and make no failure of the batch.

    Raises:
        BatchFileError: before anything is asked.
        GatewayLost, OSError: what came before is in the file.
    """
    requests = BatchInput(source)
    output = BatchOutput(target)
    missing = [custom_id for custom_id in requests.custom_ids if custom_id not in output.done]
    bar = ProgressBar(len(missing), out)

    def report(result: BatchResult) -> None:
        output.write(result)
        bar.advance(result.has_failed)

    try:
        asyncio.run(runner.run(requests.read(missing), report))
    finally:
        output.close()
        bar.close()
        num_known = len(requests.custom_ids) - len(missing)
        known = f", {num_known} were there already" if num_known else ""
        failed = f" ({bar.num_failed} failed)" if bar.num_failed else ""
        print(f"{bar.num_done} of {len(missing)} requests answered{failed}{known}", file=out)
    return 0
