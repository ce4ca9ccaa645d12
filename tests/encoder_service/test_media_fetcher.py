"""Fetches from a hostile server: what is asked of whom, what is refused, and what the refusal says."""

from __future__ import annotations

import asyncio
import gzip
import logging
import ssl
import time
from ipaddress import ip_address
from typing import Any

import pytest

from encoder_service.fetch_limits import FetchLimits
from encoder_service.media_fetcher import NOT_FETCHED, FetchBudget, MediaFetcher, open_connection
from protos.errors import InvalidRequest, Overloaded
from tests.encoder_service.hostile_server import (
    ADDRESS,
    HOST,
    URL,
    Internet,
    forever,
    internet,
    ok,
    redirect,
    status,
)
from tests.protos.conftest import Certificates, certificates  # noqa: F401  (a fixture)

BODY = b"\x89PNG and so on"
FIELD = "media[2].url"
MOST = 1000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def fetch(fetcher: MediaFetcher, url: str = URL, budget: int = 1 << 20) -> bytes:
    try:
        return await fetcher.fetch(url, MOST, FetchBudget(budget), FIELD)
    finally:
        fetcher.close()


async def refusal(fetcher: MediaFetcher, url: str = URL, budget: int = 1 << 20) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await fetch(fetcher, url, budget)
    assert caught.value.field == FIELD
    return caught.value.message


async def test_a_file_comes_from_the_checked_address_under_its_own_name() -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        assert await fetch(it.fetcher()) == BODY
    assert it.connected == [(ADDRESS, 443, HOST)]
    assert it.resolved == [HOST]


async def test_a_request_tells_nothing_but_what_it_wants() -> None:
    async with internet(**{"a.png?x=1": ok(BODY)}) as it:
        assert await fetch(it.fetcher(), f"https://{HOST.upper()}.:443/a.png?x=1#part") == BODY
    assert it.requests == [
        f"GET /a.png?x=1 HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: tessera\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
    ]


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"5\r\n" + BODY[:5] + b"\r\n9\r\n" + BODY[5:] + b"\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + ok(BODY),
    ],
)
async def test_every_framing_of_a_body_is_understood(answer: bytes) -> None:
    async with internet(**{"a.png": answer}) as it:
        assert await fetch(it.fetcher()) == BODY


async def test_nothing_is_fetched_by_default() -> None:
    async with internet() as it:
        fetcher = MediaFetcher(FetchLimits(), it.resolve, it.connect)
        assert await refusal(fetcher) == "fetching URLs is not enabled on this server"
    assert it.resolved == it.connected == []


async def test_only_the_hosts_of_the_list_are_fetched_from() -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        assert await fetch(it.fetcher(media_hosts=(HOST,))) == BODY
        for host in (f"a.{HOST}", "example.org", f"x{HOST}"):
            it.names[host] = [ADDRESS]
            message = await refusal(it.fetcher(media_hosts=(HOST,)), f"https://{host}/a.png")
            assert message == "this server fetches nothing from the URL's host"
    assert it.resolved == [HOST]


async def test_http_needs_a_switch_of_its_own() -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        url = f"http://{HOST}/a.png"
        assert await refusal(it.fetcher(), url) == "only https URLs are fetched by this server"
        assert it.connected == []
        assert await fetch(it.fetcher(media_http=True), url) == BODY
    assert it.connected == [(ADDRESS, 80, None)]


INTERNAL = [
    "127.0.0.1",
    "10.1.2.3",
    "169.254.169.254",
    "100.100.100.200",
    "192.168.0.1",
    "172.31.255.255",
    "168.63.129.16",
    "0.0.0.0",
    "255.255.255.255",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::7f00:1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", INTERNAL)
async def test_a_name_of_an_internal_address_is_not_connected_to(address: str) -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        it.names[HOST] = [address]
        assert await refusal(it.fetcher()) == NOT_FETCHED
        it.names[HOST] = [ADDRESS, address]  # one of several is enough
        assert await refusal(it.fetcher(media_hosts=(HOST,))) == NOT_FETCHED
    assert it.connected == []


@pytest.mark.parametrize("address", [address for address in INTERNAL if "%" not in address])
async def test_an_internal_address_in_the_url_is_not_connected_to(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    async with internet(**{"a.png": ok(BODY), "b": redirect(f"https://{host}/a.png")}) as it:
        assert await refusal(it.fetcher(), f"https://{host}/a.png") == NOT_FETCHED
        assert it.connected == []
        assert await refusal(it.fetcher(), f"https://{HOST}/b") == NOT_FETCHED
    assert len(it.connected) == 1


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.0.1.", "[::ffff:7f00:1]"]
)
async def test_other_spellings_of_loopback_are_not_connected_to(host: str) -> None:
    async with internet(**{"a.png": ok(BODY), "b": redirect(f"https://{host}/a.png")}) as it:
        it.names |= {host: ["127.0.0.1"]}
        await refusal(it.fetcher(), f"https://{host}/a.png")
        assert it.connected == []
        assert await refusal(it.fetcher(), f"https://{HOST}/b") == NOT_FETCHED
    assert len(it.connected) == 1


async def test_a_dns_answer_that_changes_is_asked_for_once_a_hop() -> None:
    async with internet(**{"a.png": ok(BODY), "b": redirect("/a.png")}) as it:
        it.changing[HOST] = [[ADDRESS], ["127.0.0.1"]]
        assert await fetch(it.fetcher()) == BODY
        assert it.connected == [(ADDRESS, 443, HOST)]
        it.changing[HOST] = [[ADDRESS], ["127.0.0.1"]]
        assert await refusal(it.fetcher(), f"https://{HOST}/b") == NOT_FETCHED
    assert [address for address, _, _ in it.connected] == [ADDRESS, ADDRESS]


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_hop_by_hop(number: int) -> None:
    async with internet(
        **{"1": redirect("https://other.example/2", number), "2": redirect("3"), "3": ok(BODY)}
    ) as it:
        it.names["other.example"] = ["198.41.0.4"]
        assert await fetch(it.fetcher(), f"https://{HOST}/1") == BODY
    assert it.resolved == [HOST, "other.example", "other.example"]
    assert [name for _, _, name in it.connected] == it.resolved


REDIRECTS = {
    "to http": redirect(f"http://{HOST}/a.png"),
    "to another port": redirect(f"https://{HOST}:8443/a.png"),
    "to a host that is not on the list": redirect("https://other.example/a.png"),
    "to a file": redirect("file:///etc/passwd"),
    "to a user's host": redirect(f"https://{HOST}@other.example/a.png"),
    "with a backslash": redirect(f"https://other.example\\@{HOST}/a.png"),
    "without a location": status(302),
    "with blanks": redirect("/a b"),
    "to a broken bracket": redirect("https://[::1"),
    "to no host": redirect("https:///a.png"),
    "to a scheme of an app": redirect("javascript:alert(1)"),
    "to loopback under two locations": status(302, "Location: /a.png", "Location: https://127.0.0.1/a.png"),
    "in a circle": redirect("/b"),
}


@pytest.mark.parametrize("case", REDIRECTS)
async def test_a_redirect_is_not_followed(case: str) -> None:
    async with internet(**{"a.png": ok(BODY), "b": REDIRECTS[case]}) as it:
        it.names["other.example"] = [ADDRESS]
        fetcher = it.fetcher(media_hosts=(HOST,), media_http=True)
        assert await refusal(fetcher, f"https://{HOST}/b") == NOT_FETCHED
        assert len(it.connected) == (4 if case == "in a circle" else 1)
        assert b"a.png" not in b"".join(it.requests)


async def test_a_file_of_more_bytes_than_allowed_is_refused_by_its_header() -> None:
    async with internet(
        **{"a.png": forever(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", b"", 0.01)}
    ) as it:
        assert "more than 1000 bytes" in await refusal(it.fetcher())


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_an_endless_file_is_cut_off(start: bytes) -> None:
    piece = b"64\r\n" + bytes(100) + b"\r\n"
    async with internet(**{"a.png": forever(start, piece)}) as it:
        assert "more than 1000 bytes" in await refusal(it.fetcher())


async def test_the_fetches_of_a_stream_share_its_budget() -> None:
    async with internet(**{"a.png": ok(bytes(600))}) as it:
        fetcher, budget = it.fetcher(), FetchBudget(1000)
        await fetcher.fetch(URL, MOST, budget, FIELD)
        assert budget.left == 400
        with pytest.raises(InvalidRequest, match="the request's media"):
            await fetcher.fetch(URL, MOST, budget, FIELD)
        fetcher.close()


SLOW = {
    "nothing": forever(b"", b"", 0.01),
    "a header a byte at a time": forever(b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.01),
    "headers without an end": forever(b"HTTP/1.1 200 OK\r\n", b"X-A: a\r\n", 0.01),
    "interim answers without an end": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "a body a byte at a time": forever(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"a", 0.01),
}


@pytest.mark.parametrize("case", SLOW)
async def test_a_slow_server_has_a_deadline(case: str) -> None:
    async with internet(**{"a.png": SLOW[case]}) as it:
        started = time.monotonic()
        assert await refusal(it.fetcher(fetch_timeout_s=0.3)) == NOT_FETCHED
        assert time.monotonic() - started < 2


UNUSABLE = {
    "404": status(404),
    "500": status(500),
    "206": status(206),
    "304": status(304),
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "HTTP 0.9": BODY,
    "nothing at all": b"",
    "a truncated body": ok(BODY)[:-3],
    "a truncated chunk": CHUNKED + b"20\r\nabc",
    "two lengths": ok(BODY, "Content-Length: 5"),
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "a compressed body": ok(BODY, "Content-Encoding: gzip"),
    "a body that says twice how it is coded": ok(BODY, "Content-Encoding: identity, gzip"),
    "a transfer that is compressed": CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n",
    "a length beyond all numbers": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "another protocol": status(101, "Upgrade: websocket", "Connection: upgrade"),
    "a chunk beyond all numbers": CHUNKED + b"f" * 300 + b"\r\n",
    "large trailers": CHUNKED + b"0\r\n" + b"X-A: a\r\n" * 20_000 + b"\r\n",
    "a header that is folded": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n 3\r\n\r\n" + BODY,
    "large headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: a\r\n" * 20_000 + b"\r\n",
    "tiny chunks": CHUNKED + b"1\r\na\r\n" * 5000,
}


@pytest.mark.parametrize("case", UNUSABLE)
async def test_an_unusable_answer_is_no_file(case: str) -> None:
    async with internet(**{"a.png": UNUSABLE[case]}) as it:
        fetcher = it.fetcher()
        with pytest.raises(InvalidRequest) as caught:
            await fetcher.fetch(URL, 1 << 20, FetchBudget(1 << 20), FIELD)
        fetcher.close()
        assert caught.value.message == NOT_FETCHED


async def test_what_fails_on_the_way_sounds_the_same_and_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with internet(**{"a.png?secret=1": status(404)}) as it:
        it.names |= {"blocked.example": ["10.9.8.7"], "refused.example": ["198.41.0.4"]}
        it.unreachable.add("198.41.0.4")
        hosts = (HOST, "blocked.example", "refused.example", "unknown.example")
        messages = {await refusal(it.fetcher(), f"https://{host}/a.png?secret=1") for host in hosts}
    assert messages == {NOT_FETCHED}
    for detail in ("status 404", "is at 10.9.8.7", "198.41.0.4: ", "has no address"):
        assert detail in caplog.text
    assert "secret" not in caplog.text  # signed URLs are keys


async def test_another_address_of_the_name_is_tried() -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        it.names[HOST] = ["2606:2800:21f::1", ADDRESS]
        it.unreachable.add("2606:2800:21f::1")
        assert await fetch(it.fetcher()) == BODY


async def test_a_fetch_waits_for_a_place_only_so_long() -> None:
    async with internet(**{"a.png": SLOW["nothing"]}) as it:
        fetcher = it.fetcher(max_fetches=1, fetch_timeout_s=0.5)
        first = asyncio.create_task(fetcher.fetch(URL, MOST, FetchBudget(MOST), FIELD))
        await until_connected(it)
        fetcher._limits = FetchLimits(media_hosts=("*",), max_fetches=1, fetch_timeout_s=0.05)
        with pytest.raises(Overloaded) as caught:
            await fetcher.fetch(URL, MOST, FetchBudget(MOST), FIELD)
        assert caught.value.retry_after_s
        with pytest.raises(InvalidRequest):
            await first
        fetcher.close()


async def test_a_stream_takes_at_most_half_of_the_places() -> None:
    async with internet(**{"a.png": SLOW["nothing"], "b": ok(BODY)}) as it:
        fetcher = it.fetcher(max_fetches=4, fetch_timeout_s=30)
        budget = fetcher.budget(1 << 20)
        slow = [asyncio.create_task(fetcher.fetch(URL, MOST, budget, FIELD)) for _ in range(8)]
        await until_connected(it, 2)
        assert await fetch(fetcher, f"https://{HOST}/b") == BODY
        assert sum(b"/a.png" in head for head in it.requests) == 2
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
        assert await fetcher.fetch(f"https://{HOST}/b", MOST, budget, FIELD) == BODY


async def test_a_cancelled_fetch_leaves_no_connection_and_gives_its_place_back() -> None:
    async with internet(**{"a.png": SLOW["nothing"], "b": ok(BODY)}) as it:
        fetcher = it.fetcher(max_fetches=1)
        first = asyncio.create_task(fetcher.fetch(URL, MOST, FetchBudget(MOST), FIELD))
        await until_connected(it)
        first.cancel()
        await asyncio.wait([first])
        assert await fetch(fetcher, f"https://{HOST}/b") == BODY


async def until_connected(it: Internet, number: int = 1) -> None:
    async with asyncio.timeout(5):
        while len(it.requests) < number:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(("name", "works"), [("encoders.internal", True), ("other.internal", False)])
async def test_the_certificate_must_be_the_names(
    certificates: Certificates,  # noqa: F811
    name: str,
    works: bool,
) -> None:
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_tls.load_cert_chain(certificates.named, certificates.named_key)
    client_tls = ssl.create_default_context(cafile=certificates.ca)
    it = Internet({"/a.png": ok(BODY)}, {name: [ADDRESS]})
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0, ssl=server_tls)
    port = server.sockets[0].getsockname()[1]

    async def connect(address: Any, _port: int, tls_name: str | None) -> Any:
        return await open_connection(ip_address("127.0.0.1"), port, tls_name, client_tls)

    fetcher = MediaFetcher(FetchLimits(media_hosts=("*",)), it.resolve, connect)
    if works:
        assert await fetch(fetcher, f"https://{name}/a.png") == BODY
    else:
        assert await refusal(fetcher, f"https://{name}/a.png") == NOT_FETCHED
    server.close()


async def test_a_body_that_claims_to_be_compressed_is_never_inflated() -> None:
    bomb = gzip.compress(bytes(MOST * 100))
    async with internet(**{"a.png": ok(bomb), "b": ok(bomb, "Content-Encoding: gzip")}) as it:
        assert await fetch(it.fetcher()) == bomb
        assert await refusal(it.fetcher(), f"https://{HOST}/b") == NOT_FETCHED


async def test_what_the_server_says_before_it_is_asked_counts_as_the_answer_to_one_request() -> None:
    """Two answers on a connection: the second is for nobody."""
    async with internet(**{"a.png": ok(BODY) + ok(b"another")}) as it:
        assert await fetch(it.fetcher()) == BODY
        assert len(it.requests) == 1


async def test_the_host_of_a_redirect_is_asked_under_its_own_name() -> None:
    async with internet(**{"b": redirect("//other.example./a.png"), "a.png": ok(BODY)}) as it:
        it.names["other.example"] = ["198.41.0.4"]
        assert await fetch(it.fetcher(), f"https://{HOST}/b") == BODY
    assert it.connected == [(ADDRESS, 443, HOST), ("198.41.0.4", 443, "other.example")]
    assert [b"Host: other.example\r\n" in head for head in it.requests] == [False, True]


async def test_an_address_in_the_url_needs_a_certificate_of_its_own() -> None:
    async with internet(**{"a.png": ok(BODY)}) as it:
        assert await fetch(it.fetcher(), f"https://{ADDRESS}/a.png") == BODY
    assert it.connected == [(ADDRESS, 443, ADDRESS)]
    assert f"Host: {ADDRESS}\r\n".encode() in it.requests[0]


async def test_names_are_looked_up_by_the_system() -> None:
    fetcher = MediaFetcher(FetchLimits(media_hosts=("*",)))
    assert "127.0.0.1" in await fetcher._look_up("localhost")
    assert await refusal(fetcher, "https://localhost/a.png") == NOT_FETCHED
