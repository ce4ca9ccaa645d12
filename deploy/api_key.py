"""Where the API key stands that a command sends to a gateway."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from deploy.cli import UsageError

# As the official client calls it.
API_KEY_VARIABLE = "OPENAI_API_KEY"


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"API key of the gateway (default: the variable {API_KEY_VARIABLE}); other users of this "
        "machine can see it in the list of processes",
    )
    sources.add_argument("--api-key-file", type=Path, metavar="PATH", help="file that holds the API key")


def api_key_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """The key, or nothing where none was given.

    Raises:
        UsageError: it does not fit into a header; the message does not contain it.
        OSError: its file cannot be read.
    """
    key: str | None = arguments.api_key
    path: Path | None = arguments.api_key_file
    if path is not None:
        key = path.read_text(encoding="utf-8", errors="replace")
    key = (environment.get(API_KEY_VARIABLE, "") if key is None else key).strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError("the API key has characters that no key has")
    return key
