"""The client speaks the OpenAI API's events and errors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.completions import CompletionError, Completions, Piece, user_message

USAGE = {"prompt_tokens": 70, "completion_tokens": 2, "total_tokens": 72}


def chunk(content: str | None = None, finish: str | None = None) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def sse(*events: Any) -> str:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def client(answer: httpx.Response | Exception, requests: list[httpx.Request] | None = None) -> Completions:
    def handle(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Completions("http://gateway/v1", httpx.MockTransport(handle))


def pieces(answer: httpx.Response | Exception) -> list[Piece]:
    return list(client(answer).stream("m", [user_message("hi")]))


def test_pieces_come_in_order_and_usage_last() -> None:
    body = sse(
        chunk(""), chunk("Hel"), chunk("lo"), chunk(finish="stop"), {"choices": [], "usage": USAGE}, "[DONE]"
    )
    found = pieces(httpx.Response(200, text=": keep-alive\n\n" + body))
    assert "".join(piece.text for piece in found) == "Hello"
    assert [piece.finish_reason for piece in found if piece.finish_reason] == ["stop"]
    assert found[-1].usage == USAGE


def test_the_request_asks_for_a_stream_with_usage() -> None:
    requests: list[httpx.Request] = []
    answer = httpx.Response(200, text=sse(chunk("x"), "[DONE]"))
    list(client(answer, requests).stream("m", [user_message("hi")], max_tokens=3))
    assert (requests[0].method, str(requests[0].url)) == ("POST", "http://gateway/v1/chat/completions")
    assert json.loads(requests[0].content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            httpx.Response(
                400, json={"error": {"message": "prompt too long", "code": "context_length_exceeded"}}
            ),
            r"^prompt too long \(HTTP 400\)$",
        ),
        (httpx.Response(502, text="<html>"), r"^Bad Gateway \(HTTP 502\)$"),
        (httpx.Response(503, json=["odd"]), r"^Service Unavailable \(HTTP 503\)$"),
        (httpx.ConnectError("connection refused"), "^no answer from http://gateway/v1/: connection refused$"),
        (
            httpx.Response(200, text=sse(chunk("x"), {"error": {"message": "encoder is gone"}})),
            "^encoder is gone$",
        ),
        (httpx.Response(200, text=sse(chunk("x"))), "broke off"),
    ],
)
def test_what_goes_wrong_is_said_for_people(answer: httpx.Response | Exception, message: str) -> None:
    with pytest.raises(CompletionError, match=message):
        pieces(answer)


def test_models_are_listed() -> None:
    assert client(httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})).models() == ["a", "b"]
    with pytest.raises(CompletionError, match="no answer"):
        client(httpx.ConnectError("refused")).models()


def test_pictures_go_before_the_text_as_data_uris(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "b").write_bytes(b"who knows")
    content = user_message("what?", [tmp_path / "a.png", tmp_path / "b"])["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(b"png").decode()
    assert content[1]["image_url"]["url"].startswith("data:application/octet-stream;base64,")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.MP4", {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,eA=="}}),
        ("a.mkv", {"type": "video_url", "video_url": {"url": "data:video/x-matroska;base64,eA=="}}),
        (
            "a.pdf",
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,eA=="}},
        ),
    ],
)
def test_videos_and_documents_go_as_what_they_are(tmp_path: Path, name: str, expected: Any) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert user_message("what?", [tmp_path / name])["content"] == [
        expected,
        {"type": "text", "text": "what?"},
    ]
