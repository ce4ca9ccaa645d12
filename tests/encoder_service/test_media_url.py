from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from encoder_service.media_url import BadUrl, parse_media_url
from encoder_service.public_address import is_public


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
        "http\u017f://example.org/",
        "https://\u212aernel.org/",
        "https://example.org/\u212a",
        "https://example.org\u2044a/",
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
        "https://[fe80::1%eth0]/",
        "https://[::1",
        "https://[x]/",
        "https://0/",
        "https://0x/",
        "https://1.2.3.0x4/",
        "https://169.254.43518/",
        "https://0251.0376.0251.0376/",
        "https://example.org:443:443/",
        "https://example.org:+443/",
        "hxxps://example.org/",
        "https//example.org/",
        "https://example.org%00.evil.example/",
        "https://%65xample.org/",
        "https://example.org/" + "a" * 2048,
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(BadUrl):
        parse_media_url(text)


@pytest.mark.parametrize(
    ("location", "host", "target"),
    [
        ("https://other.example/b", "other.example", "/b"),
        ("HTTPS://OTHER.EXAMPLE.", "other.example", "/"),
        ("//other.example/b?x", "other.example", "/b?x"),
        ("/b", "example.org", "/b"),
        ("b", "example.org", "/a/b"),
        ("../../../b", "example.org", "/b"),
        ("?x=//y", "example.org", "/a/a.png?x=//y"),
        ("/b//c@d", "example.org", "/b//c@d"),
        ("#part", "example.org", "/a/a.png"),
    ],
)
def test_a_location_is_read_as_the_url_would_be(location: str, host: str, target: str) -> None:
    url = parse_media_url("https://example.org/a/a.png").redirected(location)
    assert (url.scheme, url.host, url.target) == ("https", host, target)


@pytest.mark.parametrize(
    "location",
    [
        "https:///b",
        "https:b",
        "///b",
        "//[::1",
        "//[x]/",
        "https://[::1",
        "http://example.org/",
        "//user@example.org/",
        "//example.org:8443/",
        "gopher://example.org/",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "/\\\\evil.example/",
    ],
)
def test_a_location_that_could_be_read_in_two_ways_is_refused(location: str) -> None:
    with pytest.raises(BadUrl):
        parse_media_url("https://example.org/a/a.png").redirected(location)


@pytest.mark.parametrize(
    "start", ["https://example.org//[evil]/a", "https://example.org/a/b?c", "https://[2606:2800:21f::1]"]
)
def test_a_location_without_a_host_never_leaves_it(start: str) -> None:
    source, url = random.Random(1), parse_media_url(start)
    num_read = 0
    for _ in range(5000):
        location = "".join(source.choice("/.:?#[]@%a;=&\\") for _ in range(source.randint(0, 8)))
        try:
            target = url.redirected(location)
        except BadUrl:
            continue
        num_read += 1
        assert target.host == url.host or location.startswith("//")
    assert num_read > 1000


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "100.64.0.1",
        "169.254.169.254",
        "192.0.0.192",
        "192.88.99.1",
        "198.19.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::8.8.8.8",
        "::ffff:8.8.8.8",
        "::ffff:0:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:0:53aa:64c:0:fbff:f5ff:fffe",
        "2001:db8::1",
        "2002:808:808::1",
        "3fff::1",
        "5f00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff0e::1",
        "2606:2800:21f::1%eth0",
    ],
)
def test_an_address_that_is_not_public_or_wraps_another_one_is_known(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "100.128.0.1", "172.32.0.1", "2606:2800:21f::1", "2a00:1450::1"]
)
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(ip_address(address))
