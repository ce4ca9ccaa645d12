"""The `tessera` command: finds the subcommand and imports only what that one needs."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

# Subcommand -> (summary, module, name of its Command there).  Imported when chosen, so that
# `tessera gateway` needs no torch and `tessera --help` is instant.
COMMANDS = {
    "serve": ("encoder, language model and gateway on this machine", "deploy.serve", "ServeCommand"),
    "encoder": (
        "media in, visual tokens out (gRPC)",
        "deploy.service",
        "encoder_command",
    ),
    "llm": ("messages and media in, text out (gRPC)", "deploy.service", "llm_command"),
    "gateway": ("the OpenAI API in front of language models (HTTP)", "deploy.service", "gateway_command"),
    "chat": ("talk to a running gateway in the terminal", "deploy.chat", "ChatCommand"),
    "batch": ("a file of requests to a running gateway", "deploy.batch", "BatchCommand"),
    "bench": ("measure decode and transport on this machine", "deploy.bench.command", "BenchCommand"),
}
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class Command(Protocol):
    log_level: str  # unless --log-level says otherwise

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code.

        Raises:
            UsageError: the arguments do not fit together.
        """


class UsageError(Exception):
    """Wrong arguments, seen only after parsing; the message names them."""


class _Version(argparse.Action):
    """Like argparse's own, but looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print(f"tessera {metadata.version('tessera')}")
        except metadata.PackageNotFoundError:
            print("tessera (run from a source tree that is not installed)")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="tessera",
        description="Serve InternVL as an encoder and a language model over gRPC.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    command: Any = None
    for name, (summary, module, factory) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == chosen:
            command = getattr(importlib.import_module(module), factory)()
            add_common_arguments(subparser, command)
            subparser.set_defaults(subparser=subparser)
    arguments = parser.parse_args(argv)
    return _run(command, arguments)


def add_common_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    command.add_arguments(parser)
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default=command.log_level,
        help="least level that goes to stderr (default: %(default)s)",
    )


def _run(command: Command, arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=arguments.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    try:
        return command.run(arguments)
    except UsageError as error:
        arguments.subparser.print_usage(sys.stderr)
        print(f"{arguments.subparser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
