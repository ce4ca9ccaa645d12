"""Request ids and W3C trace context: what travels in the metadata of every call."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

REQUEST_ID_KEY = "x-request-id"
# Passed on unchanged from call to call: https://www.w3.org/TR/trace-context/
TRACE_KEYS = ("traceparent", "tracestate")
_VALID_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

Metadata = tuple[tuple[str, str], ...]


def accept_request_id(candidate: str | None) -> str:
    """The caller's id where it is safe to log and to send on, else a new one."""
    if candidate and _VALID_ID.fullmatch(candidate):
        return candidate
    return uuid.uuid4().hex


def outgoing_metadata(request_id: str, incoming: Sequence[tuple[str, Any]] | None = None) -> Metadata:
    """Metadata of a call made on behalf of a request: its id, and the trace context it came with."""
    trace = tuple((key, str(value)) for key, value in incoming or () if key in TRACE_KEYS)
    return ((REQUEST_ID_KEY, request_id), *trace)


def request_id_of(context: grpc.aio.ServicerContext[Any, Any], in_message: str = "") -> str:
    """The id in the message, else the one in the metadata, else a new one."""
    metadata = dict(context.invocation_metadata() or ())
    return accept_request_id(in_message or str(metadata.get(REQUEST_ID_KEY, "")))
