"""Chat requests with a picture, in turns to the gateway and to a route that only reads them.

`python -m deploy.bench.picture_load` reads one PictureLoad as JSON from stdin and prints one PictureTimes.
"""

from __future__ import annotations

import base64
import json
import random
import re
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from deploy.bench.chat_request import chat_request
from deploy.bench.child_processes import answer_of

WARM_UP = 10
NUM_PICTURES = 8  # taken in turns
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class PictureLoad:
    host: str
    gateway_port: int
    bare_port: int
    model: str
    picture_bytes: int
    requests: int  # to each of the two


@dataclass(frozen=True)
class PictureTimes:
    """Medians, from the first byte of a request sent to the last of its answer."""

    gateway_ms: float
    bare_ms: float


class _Connection:
    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> float:
        """Seconds until the whole answer is there; raises ConnectionError for any but a 200."""
        start = time.perf_counter()
        self._socket.sendall(request)
        answer = self._socket.recv(1 << 16)
        while not _is_whole(answer):
            more = self._socket.recv(1 << 16)
            if not more:
                raise ConnectionError("the server closed the connection")
            answer += more
        seconds = time.perf_counter() - start
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(answer[:2000].decode())
        return seconds


def _is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def picture_request(model: str, data: bytes) -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return chat_request({"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 1})


def run(load: PictureLoad) -> PictureTimes:
    numbers = random.Random(0)
    requests = [
        picture_request(load.model, numbers.randbytes(load.picture_bytes)) for _ in range(NUM_PICTURES)
    ]
    connections = [_Connection(load.host, port) for port in (load.gateway_port, load.bare_port)]
    rounds = [
        [connection.ask(requests[number % NUM_PICTURES]) for connection in connections]
        for number in range(WARM_UP + load.requests)
    ]
    return PictureTimes(*map(_median_ms, zip(*rounds[WARM_UP:], strict=True)))


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3


def run_apart(load: PictureLoad) -> PictureTimes:
    """In a process of its own; raises RuntimeError with what that said."""
    return PictureTimes(**json.loads(answer_of(__name__, json.dumps(asdict(load)))))


if __name__ == "__main__":
    print(json.dumps(asdict(run(PictureLoad(**json.load(sys.stdin))))))
