"""Files of OpenAI's batch format: requests in, results out, a JSON object a line.

https://platform.openai.com/docs/guides/batch.  Knows nothing about HTTP.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_RESULT_START = b'{"id":"batch_req_'


class BatchFileError(Exception):
    """A file is not in the batch format; the message names file and line."""


@dataclass(frozen=True)
class BatchRequest:
    custom_id: str
    url: str  # a path, as "/v1/chat/completions"
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchResult:
    """What became of a request: an answer, whatever its status, or the reason why there is none."""

    custom_id: str
    status: int = 0
    request_id: str = ""
    body: Any = None
    error_code: str = ""  # not empty: there is no answer
    error_message: str = ""

    @property
    def has_failed(self) -> bool:
        return bool(self.error_code) or self.status >= 400

    def line(self) -> bytes:
        answer = {"status_code": self.status, "request_id": self.request_id, "body": self.body}
        error = {"code": self.error_code, "message": self.error_message}
        entry = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": self.custom_id,
            "response": None if self.error_code else answer,
            "error": error if self.error_code else None,
        }
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


class BatchInput:
    """A file of requests, checked as a whole, read line by line: it may be larger than memory."""

    def __init__(self, path: Path) -> None:
        """Raises BatchFileError for a line that is no request or a custom_id that is there twice; OSError."""
        self._path = path
        self._offsets: dict[str, int] = {}
        with path.open("rb") as file:
            for number, (offset, line) in enumerate(_lines(file), 1):
                request = _read_request(line, f"{path}, line {number}")
                if request is not None:
                    self._add(request.custom_id, offset, number)

    def _add(self, custom_id: str, offset: int, number: int) -> None:
        if custom_id in self._offsets:
            raise BatchFileError(f"{self._path}, line {number}: custom_id {custom_id!r} is there twice")
        self._offsets[custom_id] = offset

    @property
    def custom_ids(self) -> list[str]:
        """In the order of the file."""
        return list(self._offsets)

    def read(self, custom_ids: list[str]) -> Iterator[BatchRequest]:
        """These requests, each when it is asked for."""
        with self._path.open("rb") as file:
            for custom_id in custom_ids:
                file.seek(self._offsets[custom_id])
                request = _read_request(file.readline(), str(self._path))
                if request is None or request.custom_id != custom_id:
                    raise BatchFileError(f"{self._path} was changed while it was read")
                yield request


class BatchOutput:
    """A file of results that grows: what an earlier run wrote stays, but not a line left half written."""

    def __init__(self, path: Path) -> None:
        """Raises BatchFileError when the file holds something else than results; OSError."""
        self.done: set[str] = set()  # custom_ids
        self._file = path.open("a+b")
        try:
            self._file.truncate(self._read(path))
        except BatchFileError:
            self._file.close()
            raise

    def _read(self, path: Path) -> int:
        """Where the last whole line ends."""
        end = 0
        self._file.seek(0)
        for number, (offset, line) in enumerate(_lines(self._file), 1):
            place = f"{path}, line {number}"
            if line.strip() and not line.startswith(_RESULT_START[: len(line)]):
                raise BatchFileError(f"{place}: not a result that this command wrote; name another file")
            if not line.endswith(b"\n"):
                break
            end = offset + len(line)
            if line.strip():
                self.done.add(_custom_id(_object(line, place), place))
        return end

    def write(self, result: BatchResult) -> None:
        """On the disk's way at once: whoever kills us loses no answer that was paid for."""
        self._file.write(result.line())
        self._file.flush()
        self.done.add(result.custom_id)

    def close(self) -> None:
        self._file.close()


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        yield offset, line
        offset += len(line)


def _read_request(line: bytes, place: str) -> BatchRequest | None:
    """None for an empty line."""
    if not line.strip():
        return None
    entry = _object(line, place)
    url, body = entry.get("url"), entry.get("body")
    if entry.get("method") != "POST":
        raise BatchFileError(f'{place}: method must be "POST"')
    if not isinstance(url, str) or not url.startswith("/v1/"):
        raise BatchFileError(f'{place}: url must be a path such as "/v1/chat/completions"')
    if not isinstance(body, dict):
        raise BatchFileError(f"{place}: body must be an object")
    if body.get("stream"):
        raise BatchFileError(f"{place}: a batch has no streams; leave out body.stream")
    return BatchRequest(_custom_id(entry, place), url, body)


def _custom_id(entry: dict[str, Any], place: str) -> str:
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchFileError(f"{place}: custom_id must be a string that is not empty")
    return custom_id


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BatchFileError(f"{place}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise BatchFileError(f"{place}: must be an object")
    return entry
