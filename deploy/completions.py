"""A small client of the OpenAI API: streams chat completions over plain HTTP.

Knows JSON and server-sent events; knows nothing about the terminal.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# A first answer may wait for a long queue; a connection may not.
TIMEOUT = httpx.Timeout(None, connect=5.0)

# Not every system's table has them all.
VIDEO_TYPES = {
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}

Message = dict[str, Any]


class CompletionError(Exception):
    """The gateway refused, failed or cannot be reached; the message is for people."""


@dataclass(frozen=True)
class Piece:
    """What one event brought: text, the end of the choice, or the usage."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class Completions:
    """`base_url` ends in /v1, as in the official client."""

    def __init__(
        self, base_url: str, transport: httpx.BaseTransport | None = None, *, api_key: str = ""
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=base_url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT, transport=transport
        )

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Raises CompletionError."""
        try:
            response = self._http.get("models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        _check(response)
        return [model["id"] for model in response.json()["data"]]

    def stream(self, model: str, messages: Sequence[Message], **options: Any) -> Generator[Piece, None, None]:
        """Yield pieces as they arrive; leaving the loop early cancels the request.

        Raises:
            CompletionError: refused, failed half-way, or the connection was lost.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        try:
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _check(response)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> CompletionError:
        return CompletionError(f"no answer from {self._http.base_url}: {error or type(error).__name__}")


def user_message(text: str, files: Sequence[Path] = ()) -> Message:
    """Files first, as data URIs, then the text.  Raises OSError for a file that cannot be read."""
    parts = [_part(path) for path in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _part(path: Path) -> dict[str, Any]:
    """By the name's ending; the server goes by the content."""
    uri = data_uri(path)
    if uri.startswith("data:video/"):
        return {"type": "video_url", "video_url": {"url": uri}}
    if uri.startswith("data:application/pdf"):
        return {"type": "file", "file": {"filename": path.name, "file_data": uri}}
    return {"type": "image_url", "image_url": {"url": uri}}


def data_uri(path: Path) -> str:
    known = VIDEO_TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0]
    kind = known or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    for line in lines:
        if not line.startswith("data:"):  # blank lines and keep-alive comments
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise CompletionError(event["error"]["message"])
        for choice in event["choices"]:
            yield Piece(choice["delta"].get("content") or "", choice.get("finish_reason"))
        if event.get("usage"):
            yield Piece(usage=event["usage"])
    raise CompletionError("the answer broke off: the gateway closed the connection")


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    raise CompletionError(f"{message} (HTTP {response.status_code})")
