from __future__ import annotations

import pytest

from encoder_service.media_url import BadUrl, parse_media_url


@pytest.mark.parametrize(
    ("text", "host", "port", "target"),
    [
        ("https://example.org", "example.org", 443, "/"),
        ("HTTPS://Example.ORG./a", "example.org", 443, "/a"),
        ("https://example.org?x=/y#z", "example.org", 443, "/?x=/y"),
        ("http://example.org:80/a%20b;c=1?d=[e]&f", "example.org", 80, "/a%20b;c=1?d=[e]&f"),
        ("https://xn--bcher-kva.example/@a", "xn--bcher-kva.example", 443, "/@a"),
        ("https://93.184.215.14/", "93.184.215.14", 443, "/"),
        ("https://[2606:2800:21F:0::1]:443/", "2606:2800:21f::1", 443, "/"),
    ],
)
def test_a_url_has_one_reading(text: str, host: str, port: int, target: str) -> None:
    url = parse_media_url(text)
    assert (url.host, url.port, url.target) == (host, port, target)
    assert url.authority == (f"[{host}]" if ":" in host else host)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.org/a.png",
        "//example.org/a.png",
        "file:///etc/passwd",
        "ftp://example.org/a",
        "data:image/png;base64,AAAA",
        "https:example.org",
        "https:///a",
        "https://",
        "https://user@example.org/",
        "https://user:word@example.org/",
        "https://example.org\\@evil.example/",
        "https://example.org/a\\b",
        "https://example.org/a b",
        " https://example.org/",
        "https://example.org/\n",
        "https://exa\tmple.org/",
        "https://example.org/\x00",
        "https://bücher.example/",
        "https://example\uff0eorg/",
        "https://example.org/ü",
        "https://example..org/",
        "https://.example.org/",
        "https://example.org../",
        "https://-a.example/",
        "https://" + "a" * 64 + ".example/",
        "https://" + "a." * 127 + "example/",
        "https://example.org:/",
        "https://example.org:22/",
        "https://example.org:80/",
        "http://example.org:443/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://127.1/",
        "https://0177.0.0.1/",
        "https://1.2.3.4.5/",
        "https://256.1.1.1/",
        "https://example.1/",
        "https://[::1/",
        "https://[127.0.0.1]/",
        "https://[::ffff:1.2.3]/",
        "https://[fe80::1%25eth0]/",
        "https://example.org/" + "a" * 2048,
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(BadUrl):
        parse_media_url(text)
