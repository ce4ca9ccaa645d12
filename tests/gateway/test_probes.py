"""/health, /ready, /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from prometheus_client.parser import text_string_to_metric_families

from gateway.config import GatewayConfig
from protos import language_model_pb2 as pb
from tests.gateway.scripted import (
    ask,
    default_info,
    delta,
    finished,
    gateway_before,
    serving,
    started,
    usage,
)


async def test_ready_follows_language_model_and_encoder() -> None:
    async with gateway_before(info=default_info(encoders_ready=0)) as gateway:
        no_encoder = await gateway.http.get("/ready")
        gateway.llm.info = default_info(encoders_ready=1)
        ready = await gateway.http.get("/ready")
        await gateway.llm.stop()
        nobody = await gateway.http.get("/ready")
        health = await gateway.http.get("/health")
        await gateway.llm.listen(gateway.llm_port)
        async with asyncio.timeout(5):
            while (await gateway.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
    assert (no_encoder.status_code, no_encoder.json()["missing"]) == (503, ["encoder"])
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "model": "org/tiny-vl"})
    assert (nobody.status_code, nobody.json()["missing"]) == (503, ["language_model", "encoder"])
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


async def test_a_silent_language_model_is_not_ready() -> None:
    async with gateway_before(config=GatewayConfig(model_timeout_s=0.2)) as gateway:
        gateway.llm.answers_get_model = False
        async with asyncio.timeout(2):
            response = await gateway.http.get("/ready")
    assert (response.status_code, response.json()["missing"]) == (503, ["language_model", "encoder"])


async def test_one_good_service_of_several_is_enough() -> None:
    async with gateway_before() as good, serving("127.0.0.1:1", f"127.0.0.1:{good.llm_port}") as port:
        response = await good.http.get(f"http://127.0.0.1:{port}/ready")
    assert response.status_code == 200


async def test_metrics_count_what_happened() -> None:
    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield delta("a")
        yield delta("b", num_tokens=2)
        yield finished()
        yield usage(prompt=300, completion=3, cached=16, visual=256)

    async with gateway_before(script) as gateway:
        await gateway.post(ask())
        await gateway.post(ask(stream=True))
        await gateway.post(ask(temperature=9))
        await gateway.http.get("/no/such/path")
        response = await gateway.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    requests = "tessera_gateway_requests_total"
    assert samples[requests, "/v1/chat/completions", "200"] == 2
    assert samples[requests, "/v1/chat/completions", "400"] == 1
    assert samples[requests, "other", "404"] == 1
    assert samples[("tessera_gateway_in_flight",)] == 1  # this one
    assert samples[("tessera_gateway_time_to_first_token_seconds_count",)] == 2
    assert samples[("tessera_gateway_inter_token_seconds_count",)] == 2
    tokens = {
        kind: samples["tessera_gateway_tokens_total", kind]
        for kind in ("prompt", "image", "cached", "completion")
    }
    assert tokens == {"prompt": 600, "image": 512, "cached": 32, "completion": 6}
