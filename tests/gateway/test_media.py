"""Data URIs."""

from __future__ import annotations

import base64

import pytest

from gateway.errors import RequestError
from gateway.media import (
    DOCUMENT,
    THREAD_THRESHOLD_CHARS,
    VIDEO,
    decode_data_uri,
    decode_file_data,
    is_web_url,
)


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "DATA:IMAGE/JPEG;BASE64,", "data:image/webp;charset=binary;base64,"],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000, THREAD_THRESHOLD_CHARS])
async def test_bytes_come_back_as_they_were(head: str, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert await decode_data_uri(head + base64.b64encode(data).decode(), "p", size) == data


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://example.com/cat.png", "invalid_image_url"),
        ("http://127.0.0.1/", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:", "invalid_image_url"),
        ("data:image/png,rawbytes", "invalid_image_url"),
        ("data:image/png;base64" + " " * 500 + ",AAAA", "invalid_image_url"),
        ("data:text/html;base64,AAAA", "unsupported_image_media_type"),
        ("data:image/svg+xml;base64,AAAA", "unsupported_image_media_type"),
        ("data:;base64,AAAA", "unsupported_image_media_type"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,A", "invalid_base64_image"),
        ("data:image/png;base64,AAAA====", "invalid_base64_image"),
        ("data:image/png;base64,AA AA", "invalid_base64_image"),
        ("data:image/png;base64,AA-_", "invalid_base64_image"),
        ("data:image/png;base64,AAÄA", "invalid_base64_image"),
        ("data:image/png;base64," + "A" * 40, "image_file_too_large"),
    ],
)
async def test_anything_else_is_refused_by_its_path(uri: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        await decode_data_uri(uri, "messages.0.content.0.image_url.url", 16)
    assert (caught.value.error_code, caught.value.field) == (code, "messages.0.content.0.image_url.url")
    assert "messages.0.content.0.image_url.url" in caught.value.message


@pytest.mark.parametrize(
    "uri", ["file:///etc/passwd", "/etc/passwd", "ftp://example.com/a", "blob:a", "\\\\host\\a"]
)
async def test_nothing_else_than_a_data_uri_is_read(uri: str) -> None:
    assert not is_web_url(uri, "p")
    with pytest.raises(RequestError, match="nothing is read from elsewhere"):
        await decode_data_uri(uri, "p", 16)


@pytest.mark.parametrize("uri", ["https://example.com/cat.png", "HTTP://example.com"])
def test_web_urls_are_for_the_encoder(uri: str) -> None:
    assert is_web_url(uri, "p")


@pytest.mark.parametrize("uri", ["https://example.com/" + "a" * 2048, "https://ex\u00e4mple.com/"])
def test_a_web_url_that_nobody_would_fetch_is_refused_here(uri: str) -> None:
    with pytest.raises(RequestError) as caught:
        is_web_url(uri, "p", VIDEO)
    assert (caught.value.error_code, caught.value.field) == ("invalid_video_url", "p")


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("ftp://example.com/clip.mp4", "invalid_video_url"),
        ("data:image/png;base64,AAAA", "unsupported_video_media_type"),
        ("data:video/jpeg;base64,AAAA,AAAA", "unsupported_video_media_type"),
        ("data:video/mp4;base64,", "empty_video_file"),
        ("data:video/mp4;base64,A", "invalid_base64_video"),
        ("data:video/mp4;base64," + "A" * 400, "video_file_too_large"),
    ],
)
async def test_what_is_no_video_is_named(uri: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        await decode_data_uri(uri, "p", 100, VIDEO)
    assert (caught.value.error_code, caught.value.field) == (code, "p")


@pytest.mark.parametrize("text", ["JVBERi0=", "data:application/pdf;base64,JVBERi0="])
async def test_a_file_may_come_with_and_without_a_head(text: str) -> None:
    assert await decode_file_data(text, "p", 100, DOCUMENT) == b"%PDF-"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_file"),
        ("https://example.com/a.pdf", "invalid_file_url"),
        ("data:text/plain;base64,AAAA", "unsupported_file_media_type"),
        ("AA AA", "invalid_base64_file"),
        ("A" * 400, "file_too_large"),
    ],
)
async def test_what_is_no_file_is_named(text: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        await decode_file_data(text, "p", 100, DOCUMENT)
    assert (caught.value.error_code, caught.value.field) == (code, "p")
