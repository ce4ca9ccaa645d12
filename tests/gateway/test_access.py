"""Who is let in, over real HTTP; CORS and TLS."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access import duration, open_key_ring
from gateway.access_config import AccessConfig
from gateway.config import GatewayConfig
from tests.gateway.scripted import (
    ask,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    started,
    usage,
)
from tests.protos.conftest import Certificates, certificates  # noqa: F401  (a fixture)

KEY, OTHER = "sk-0123456789abcdef0123", "sk-another-key-of-this-test"
HASHES = tuple(hashlib.sha256(key.encode()).hexdigest() for key in (KEY, OTHER))
CHAT = "/v1/chat/completions"


def with_keys(**limits: Any) -> GatewayConfig:
    return GatewayConfig(access=AccessConfig(api_key_hashes=HASHES, **limits))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [bearer(KEY), {"authorization": f"bearer  {OTHER}"}, {"x-api-key": KEY}])
async def test_a_caller_with_a_key_is_answered(headers: dict[str, str]) -> None:
    async with gateway_before(config=with_keys()) as gateway:
        assert (await gateway.http.post(CHAT, json=ask(), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"authorization": "Bearer"},
        bearer(HASHES[0]),
        {"authorization": KEY},
        {"x-api-key": "x"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/x")]
)
async def test_everybody_else_is_not(method: str, path: str, headers: dict[str, str]) -> None:
    async with gateway_before(config=with_keys()) as gateway:
        response = await gateway.http.request(method, path, headers=headers)
        assert not gateway.llm.requests
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-should-retry"] == "false"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_orchestrators_need_no_key(path: str) -> None:
    async with gateway_before(config=with_keys()) as gateway:
        assert (await gateway.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (b"/page/../v1/models", 404),
        (b"/page/%2e%2e/v1/models", 404),
        (b"/page/..%2fv1%2fmodels", 404),
        (b"/health/../v1/models", 401),
        (b"//v1/models", 401),
        (b"/v1/models;/page/", 401),
    ],
)
async def test_no_way_leads_from_an_open_path_to_another(path: bytes, status: int) -> None:
    """Over a raw socket: clients tidy paths up."""
    async with gateway_before(config=with_keys()) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(f"HTTP/1.1 {status} ".encode())
        writer.close()


async def test_a_stranger_with_a_large_body_hears_the_refusal() -> None:
    async with gateway_before(config=with_keys()) as gateway:
        response = await gateway.http.post(CHAT, content=b"x" * (8 << 20))
    assert response.status_code == 401


async def test_one_at_a_time() -> None:
    script = hangs_after(started(), delta("a"))
    async with gateway_before(script, config=with_keys(key_concurrency=1)) as gateway:
        async with gateway.http.stream("POST", CHAT, json=ask(stream=True), headers=bearer(KEY)) as stream:
            await anext(stream.aiter_bytes())
            refused = await gateway.http.get("/v1/models", headers=bearer(KEY))
            assert (await gateway.http.get("/v1/models", headers=bearer(OTHER))).status_code == 200
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        async with asyncio.timeout(5):
            while (await gateway.http.get("/v1/models", headers=bearer(KEY))).status_code != 200:
                await asyncio.sleep(0.01)  # until the gateway has noticed that the stream's client left


async def test_tokens_of_streams_count_for_their_key() -> None:
    script = replies(started(50), delta("a", num_tokens=60), finished(), usage(50, 60))
    async with gateway_before(script, config=with_keys(key_tokens_per_minute=100)) as gateway:
        await gateway.http.post(CHAT, json=ask(stream=True), headers=bearer(KEY))
        refused = await gateway.http.post(CHAT, json=ask(), headers=bearer(KEY))
        assert refused.status_code == 429 and "tokens per minute" in refused.text
        assert (await gateway.http.post(CHAT, json=ask(), headers=bearer(OTHER))).status_code == 200


def limits_told(response: httpx.Response) -> dict[str, str]:
    start = "x-ratelimit-"
    return {name[len(start) :]: text for name, text in response.headers.items() if name.startswith(start)}


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_and_refusals_tell_what_is_left_of_a_limited_key(stream: bool) -> None:
    script = replies(started(40), delta("a", num_tokens=20), finished(), usage(40, 20))
    config = with_keys(key_requests_per_minute=2, key_tokens_per_minute=1000)
    async with gateway_before(script, config=config) as gateway:
        first, _, refused = [await gateway.post(ask(stream=stream), headers=bearer(KEY)) for _ in range(3)]
        other = await gateway.http.get("/v1/models", headers=bearer(OTHER))
        probe = await gateway.http.get("/health")
    told = limits_told(first)
    assert (told["limit-requests"], told["remaining-requests"]) == ("2", "1")
    assert told["limit-tokens"] == "1000" and 900 <= int(told["remaining-tokens"]) <= 1000
    assert re.fullmatch(r"[0-9]+s", told["reset-requests"]) and re.fullmatch(
        r"[0-9]+m?s", told["reset-tokens"]
    )
    assert refused.status_code == 429 and limits_told(refused)["remaining-requests"] == "0"
    assert limits_told(other)["remaining-requests"] == "1"
    assert not limits_told(probe)


async def test_a_key_without_limits_hears_of_none() -> None:
    async with gateway_before(config=with_keys(key_concurrency=3)) as gateway:
        assert not limits_told(await gateway.post(ask(), headers=bearer(KEY)))
        assert not limits_told(await gateway.post(ask()))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0004, "1ms"), (0.25, "250ms"), (1, "1s"), (59.1, "1m0s"), (61, "1m1s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_no_page_of_another_origin_is_let_in_by_default() -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.get("/v1/models", headers={"origin": "https://a.example"})
        assert not [name for name in response.headers if name.startswith("access-control")]


async def test_pages_of_the_list_are_told_so_also_in_a_refusal() -> None:
    config = with_keys(cors_origins=("https://a.example",))
    async with gateway_before(config=config) as gateway:
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            asked = await gateway.http.options(CHAT, headers={"origin": origin, **preflight})
            assert asked.headers.get("access-control-allow-origin") == allowed
            assert asked.status_code == (200 if allowed else 400)
            refused = await gateway.http.get("/v1/models", headers={"origin": origin})
            assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, allowed)
            assert "access-control-allow-credentials" not in refused.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert not open_key_ring(GatewayConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "gateway.internal"])
def test_other_addresses_need_keys_or_the_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_no_keys"):
        open_key_ring(GatewayConfig(host=host))
    assert not open_key_ring(GatewayConfig(host=host, access=AccessConfig(allow_no_keys=True)))
    assert len(open_key_ring(GatewayConfig(host=host, access=AccessConfig(api_key_hashes=HASHES)))) == 2


async def test_over_tls(certificates: Certificates) -> None:  # noqa: F811
    config = GatewayConfig(tls_cert=certificates.server, tls_key=certificates.server_key)
    trust = ssl.create_default_context(cafile=certificates.ca)
    async with gateway_before(config=config) as gateway:
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{gateway.port}", verify=trust) as https:
            response = await https.post(CHAT, json=ask(stream=True))
            assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            await gateway.http.get("/health")


@pytest.mark.parametrize(
    "values",
    [
        {"key_concurrency": -1},
        {"key_requests_per_minute": -1},
        {"key_tokens_per_minute": -1},
        {"cors_origins": ("a.example",)},
        {"cors_origins": ("https://a.example/",)},
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AccessConfig(**values)
