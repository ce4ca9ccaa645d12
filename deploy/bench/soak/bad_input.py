"""Requests that must be refused, each with the status that is right for it."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.bench.soak.connection import request_bytes
from deploy.bench.soak.pictures import image_part

# What the gateway is started with: larger bodies are refused.
MAX_BODY_BYTES = 4 << 20


@dataclass(frozen=True)
class BadInput:
    """The bytes of a whole request; `code`: of the error object, where it is part of the contract."""

    name: str
    request: bytes
    status: int
    code: str = ""


def bad_inputs(model: str, picture: bytes) -> list[BadInput]:
    """`picture`: a JPEG that is served when whole."""
    cases = [*_malformed(), *_misdirected(model), *_oversized(model)]
    cases += [
        BadInput(f"field {name}", _chat(model, **fields), 400) for name, fields in _wrong_fields().items()
    ]
    cases += [
        BadInput(f"part {name}", _chat(model, messages=_user(part)), 400)
        for name, part in _wrong_parts(picture).items()
    ]
    return cases


def _malformed() -> Iterator[BadInput]:
    yield BadInput("empty body", request_bytes(b""), 400, "invalid_json")
    yield BadInput("cut JSON", request_bytes(b'{"messages": [{"role": "user"'), 400, "invalid_json")
    yield BadInput("deep JSON", request_bytes(b"[" * 100_000), 400, "invalid_json")
    yield BadInput("no UTF-8", request_bytes(b'{"messages": "\xff\xfe"}'), 400, "invalid_json")
    yield BadInput("an array", request_bytes(b"[]"), 400)
    yield BadInput("no messages", request_bytes(b"{}"), 400, "missing_required_parameter")


def _misdirected(model: str) -> Iterator[BadInput]:
    body = json.dumps({"model": model, "messages": _user("Hello")}).encode()
    yield BadInput("unknown model", _chat("no such model"), 404, "model_not_found")
    yield BadInput("unknown path", request_bytes(body, path="/v2/nothing"), 404, "unknown_url")
    yield BadInput("wrong method", request_bytes(body, method="PUT"), 405, "method_not_allowed")
    yield BadInput("not JSON", request_bytes(body, content_type="text/plain"), 415)


def _oversized(model: str) -> Iterator[BadInput]:
    whole = _chat(model, messages=_user("x" * (MAX_BODY_BYTES + 1)))
    yield BadInput("oversized body", whole, 413, "request_too_large")
    head, _, body = whole.partition(b"\r\n\r\n")
    head = head[: head.index(b"content-length")] + b"transfer-encoding: chunked\r\n\r\n"
    chunked = head + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    yield BadInput("oversized chunks", chunked, 413, "request_too_large")
    long = _chat(model, messages=_user("word " * 20_000))
    yield BadInput("long prompt", long, 400, "context_length_exceeded")


def _wrong_fields() -> dict[str, dict[str, Any]]:
    return {
        "messages empty": {"messages": []},
        "messages text": {"messages": "Hello"},
        "role": {"messages": [{"role": "pirate", "content": "Hello"}]},
        "content number": {"messages": [{"role": "user", "content": 7}]},
        "content null": {"messages": [{"role": "user", "content": None}]},
        "temperature high": {"temperature": 3},
        "temperature text": {"temperature": "0.5"},
        "top_p": {"top_p": 0},
        "top_k": {"top_k": -2},
        "n": {"n": 0},
        "n high": {"n": 1000},
        "max_tokens": {"max_tokens": 0},
        "max_tokens float": {"max_tokens": 1.5},
        "stop many": {"stop": ["x"] * 17},
        "stop empty": {"stop": [""]},
        "logit_bias": {"logit_bias": {"cat": 1}},
        "logprobs": {"top_logprobs": 3},
        "stream text": {"stream": "yes"},
        "stream_options": {"stream_options": {"include_usage": True}},
        "logits_processors": {"logits_processors": ["evil"]},
        "streamed": {"stream": True, "repetition_penalty": 0},
    }


def _wrong_parts(picture: bytes) -> dict[str, dict[str, Any]]:
    url = image_part(picture, "JPEG")["image_url"]["url"]
    parts = {
        "http": _url("http://127.0.0.1:1/a.jpg"),
        "file": _url("file:///etc/passwd"),
        "base64": _url(url[:-9] + "!!!!"),
        "empty": _url("data:image/png;base64,"),
        "svg": _url("data:image/svg+xml;base64,PHN2Zy8+"),
        "cut": image_part(picture[: len(picture) // 2], "JPEG"),
        "header only": image_part(picture[:40], "JPEG"),
        "no picture": image_part(b"this is no picture", "PNG"),
        "bomb": image_part(_png_of(60_000, 60_000), "PNG"),
        "no pixels": image_part(_png_of(0, 9), "PNG"),
        "tiles": {"type": "image_url", "image_url": {"url": url, "max_dynamic_patch": 1000}},
        "type": {"type": "hologram", "hologram": "?"},
    }
    broken = base64.b64encode(b"%PDF-1.7 broken").decode()
    return parts | {
        "document": {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{broken}"}}
    }


def _png_of(width: int, height: int) -> bytes:
    """A small file that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _user(content: str | dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content if isinstance(content, str) else [content]}]


def _chat(model: str, **fields: Any) -> bytes:
    body = {"model": model, "messages": _user("Hello"), "max_tokens": 4, **fields}
    return request_bytes(json.dumps(body).encode())
