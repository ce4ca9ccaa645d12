"""What nobody has asked for."""

from __future__ import annotations


class Unexpected(Exception):
    """A wrong status, answer or end; the message shows what came."""
