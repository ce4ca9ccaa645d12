"""Pictures by URL through gateway, language model and encoder, from a hostile server behind real TLS.

Production code is as it is; only the internet is ours: which name has which address, and where a connection
to a public address ends.  Every asserted answer is one the demo model is certain of.
"""

from __future__ import annotations

import asyncio
import io
import re
import ssl
import struct
import zipfile
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
import pytest_asyncio

from deploy.demo import PICTURE
from deploy.embedded import embedded_checkpoint
from encoder_service.fetch_limits import FetchLimits
from encoder_service.media_fetcher import NOT_FETCHED, Connection, MediaFetcher, open_connection
from encoder_service.public_address import Address
from tests.encoder_service.hostile_server import (
    ADDRESS,
    Answer,
    Internet,
    forever,
    ok,
    redirect,
    status,
)
from tests.gateway.scripted import serving
from tests.parity.services import running_encoder, running_language_model
from tests.pictures import data_uri, picture
from tests.protos.conftest import Certificates, certificates  # noqa: F401  (a fixture)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "encoders.internal"  # that of the certificate
CAFE = PICTURE.read_bytes()
SAY, SIGN = "What does the sign say?", "CAFE TESSERA"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TRACES = re.compile(r"\d+\.\d+\.\d+\.\d+|::|internal|errno|refused|certificate|ssl|socket|Traceback", re.I)


class SecureInternet(Internet):
    """Its connections are encrypted, and end where the fetcher checks whose certificate it is."""

    tls: ssl.SSLContext

    async def connect(self, address: Address, port: int, tls_name: str | None) -> Connection:
        self.connected.append((str(address), port, tls_name))
        return await open_connection(ip_address("127.0.0.1"), self.port, tls_name, self.tls)


@dataclass
class Site:
    http: httpx.AsyncClient
    internet: Internet

    async def ask(self, url: str, **fields: Any) -> httpx.Response:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": SAY}]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, **fields}
        return await self.http.post(CHAT, json=body)

    async def error(self, url: str) -> dict[str, Any]:
        response = await self.ask(url)
        assert response.status_code == 400, response.text
        assert not TRACES.search(response.text)
        assert response.json()["error"]["param"] == "messages.0.content.0.image_url.url"
        error: dict[str, Any] = response.json()["error"]
        return error


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(certificates: Certificates) -> AsyncIterator[Site]:  # noqa: F811
    it = SecureInternet(names={NAME: [ADDRESS]})
    it.tls = ssl.create_default_context(cafile=certificates.ca)
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_tls.load_cert_chain(certificates.named, certificates.named_key)
    limits = FetchLimits(media_hosts=("*",), fetch_timeout_s=1.0)
    fetcher = MediaFetcher(limits, it.resolve, it.connect)
    folder = embedded_checkpoint()
    async with AsyncExitStack() as stack:
        server = await asyncio.start_server(it.serve, "127.0.0.1", 0, ssl=server_tls)
        stack.callback(server.close)
        it.port = server.sockets[0].getsockname()[1]
        encoder = await stack.enter_async_context(running_encoder(folder, fetcher))
        llm = await stack.enter_async_context(running_language_model(folder, (encoder.target,)))
        port = await stack.enter_async_context(serving(llm.target))
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)
        yield Site(await stack.enter_async_context(http), it)


@pytest.fixture(autouse=True)
def only_public_addresses_are_connected_to(site: Site) -> Any:
    yield
    assert {address for address, _, _ in site.internet.connected} <= {ADDRESS}


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", data)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_of(path: str, body: dict[str, Any]) -> str:
    if path == CHAT:
        return str(body["choices"][0]["message"]["content"])
    content = body["output"][0]["content"] if path == RESPONSES else body["content"]
    return str(content[0]["text"])


def bodies(url: str) -> dict[str, dict[str, Any]]:
    image = {"type": "image", "source": {"type": "url", "url": url}}
    picture_url = {"type": "image_url", "image_url": {"url": url}}
    return {
        CHAT: {"messages": [{"role": "user", "content": [picture_url, {"type": "text", "text": SAY}]}]},
        RESPONSES: {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": url},
                        {"type": "input_text", "text": SAY},
                    ],
                }
            ]
        },
        MESSAGES: {
            "max_tokens": 20,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": SAY}]}],
        },
    }


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_picture_is_fetched_seen_and_answered_about(site: Site, path: str) -> None:
    site.internet.answers = {"/b": redirect("/cafe.jpg?size=1"), "/cafe.jpg?size=1": ok(CAFE)}
    body = bodies(f"https://{NAME}/b")[path]
    response = await site.http.post(path, json={**body, "temperature": 0})
    assert response.status_code == 200, response.text
    assert text_of(path, response.json()) == SIGN
    assert site.internet.connected[-2:] == [(ADDRESS, 443, NAME)] * 2


async def test_a_stream_says_the_same(site: Site) -> None:
    site.internet.answers = {"/cafe.jpg": ok(CAFE)}
    response = await site.ask(f"https://{NAME}/cafe.jpg", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    texts = re.findall(r'"content":"([^"]+)"', response.text)
    assert "".join(texts) == SIGN and response.text.endswith("data: [DONE]\n\n")


async def test_a_polyglot_is_the_picture_it_begins_with(site: Site) -> None:
    page = b"<html><script src=//evil.example></script>"
    site.internet.answers = {"/a": ok(CAFE + page + zipped(CAFE), "Content-Type: text/html")}
    assert text_of(CHAT, (await site.ask(f"https://{NAME}/a")).json()) == SIGN


INTERNAL = {
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mixed.example": [ADDRESS, "10.0.0.1"],
    "nowhere.example": ["0.0.0.0"],
    "translated.example": ["64:ff9b::a00:1"],
}
# What may not be told apart: what is internal, what is not there, and what is somebody else's.
NOT_TO_BE_TOLD_APART = {
    **{f"a name: {name}": f"https://{name}/" for name in INTERNAL},
    "loopback": "https://127.0.0.1/",
    "the metadata service": "https://169.254.169.254/latest/meta-data/",
    "an IPv6-mapped address": "https://[::ffff:7f00:1]/",
    "a redirect to loopback": f"https://{NAME}/to-loopback",
    "a redirect to a decimal address": f"https://{NAME}/to-decimal",
    "a redirect to http": f"https://{NAME}/to-http",
    "a redirect to a broken bracket": f"https://{NAME}/to-bracket",
    "a name that changes": "https://changing.example/to-itself",
    "a name that is not there": "https://unknown.example/",
    "a certificate of another name": "https://another.example/",
    "a file that is not there": f"https://{NAME}/404",
    "a server that trickles": f"https://{NAME}/slow",
    "a body that ends too soon": f"https://{NAME}/short",
    "a compressed body": f"https://{NAME}/gzip",
}
ANSWERS: dict[str, Answer | bytes] = {
    "/to-loopback": redirect("https://127.0.0.1:443/a.png"),
    "/to-decimal": redirect("https://2130706433/"),
    "/to-http": redirect(f"http://{NAME}/404"),
    "/to-bracket": redirect("https://[::1"),
    "/to-itself": redirect("/a"),
    "/404": status(404),
    "/slow": forever(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"a", 0.01),
    "/short": ok(CAFE)[:-9],
    "/gzip": ok(zlib.compress(CAFE), "Content-Encoding: gzip"),
}


@pytest.mark.parametrize("case", NOT_TO_BE_TOLD_APART)
async def test_what_is_not_fetched_sounds_the_same(site: Site, case: str) -> None:
    site.internet.names = {NAME: [ADDRESS], "another.example": [ADDRESS], **INTERNAL}
    site.internet.changing = {"changing.example": [[ADDRESS], ["127.0.0.1"]]}
    site.internet.answers = ANSWERS
    error = await site.error(NOT_TO_BE_TOLD_APART[case])
    assert (error["message"], error["code"]) == (NOT_FETCHED, "invalid_image_url")


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "user@127.0.0.1", "[fe80::1%25eth0]"])
async def test_odd_spellings_are_refused_by_their_text_alone(site: Site, host: str) -> None:
    site.internet.resolved.clear()
    assert (await site.error(f"https://{host}/"))["code"] == "invalid_image_url"
    assert site.internet.resolved == []


SMALL = picture(1)
INFLATES = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))
FILES = {
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "a ZIP": zipped(SMALL),
    "a PNG that inflates": SMALL[:33] + INFLATES + SMALL[33:],
    "a PNG of 2.5 gigapixels": SMALL[:16] + (50_000).to_bytes(4, "big") * 2 + SMALL[24:],
    "a picture cut in its header": SMALL[:20],
    "a picture cut in its pixels": SMALL[: len(SMALL) // 2],
}


@pytest.mark.parametrize("case", FILES)
async def test_a_file_is_refused_as_if_it_had_been_sent(site: Site, case: str) -> None:
    site.internet.answers = {"/a.png": ok(FILES[case], "Content-Type: image/png")}
    fetched = await site.error(f"https://{NAME}/a.png")
    sent = await site.error(data_uri(FILES[case]))
    assert fetched["code"] in ("invalid_image_url", sent["code"])
    assert fetched["message"] == sent["message"]


async def test_an_endless_file_is_cut_off(site: Site) -> None:
    site.internet.answers = {"/a.png": forever(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 20))}
    error = await site.error(f"https://{NAME}/a.png")
    assert "bytes" in error["message"] or error["message"] == NOT_FETCHED


async def test_it_goes_on_after_all_that(site: Site) -> None:
    site.internet.answers = {"/cafe.jpg": ok(CAFE)}
    assert text_of(CHAT, (await site.ask(f"https://{NAME}/cafe.jpg")).json()) == SIGN
    async with asyncio.timeout(10):
        while site.internet.open_connections:
            await asyncio.sleep(0.01)
