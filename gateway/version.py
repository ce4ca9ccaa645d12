"""Which version of Tessera this is."""

from __future__ import annotations

from importlib import metadata

UNKNOWN = "0+unknown"  # PEP 440; of a checkout that runs without being installed


def version() -> str:
    try:
        return metadata.version("tessera")
    except metadata.PackageNotFoundError:
        return UNKNOWN
