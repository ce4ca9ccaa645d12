"""Chat completions as the bytes of an HTTP request, for clients that are plain sockets."""

from __future__ import annotations

import json
from typing import Any

PATH = "/v1/chat/completions"


def chat_request(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text
