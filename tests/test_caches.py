"""What is known is not computed again: encoder cache, prefix cache and cache salt through real processes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.embedded import embedded_checkpoint
from tests.processes import ServiceProcess
from tests.scenes import TILED, sign
from tests.test_end_to_end import (
    MODEL,
    SAY,
    about,
    answer,
    ask,
    cached_tokens,
    compare,
    image_tokens,
    settings,
    talk,
    text_of,
)

NUM_TILES = 5  # of TILED[5], thumbnail included
BLOCK_SIZE = 16
ENCODES = "tessera_grpc_started_total /tessera.v1.Encoder/Encode"
COUNTED = ("tessera_encoder_cache_", "tessera_encoder_forwards", "tessera_llm_visual_store_")


class Counters:
    """What a service's metrics page counts, as the difference to the last look."""

    def __init__(self, service: ServiceProcess) -> None:
        pages = (re.search(r"metrics on (http://\S+)", line) for line in service.log)
        self._url = next(page[1] for page in pages if page)
        self._last: dict[str, float] = {}
        self.news()

    def news(self) -> dict[str, float]:
        """By name and label, those that have changed."""
        page = httpx.get(self._url).text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        now = {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}
        now = {name: value for name, value in now.items() if name.startswith(COUNTED) or name == ENCODES}
        last, self._last = self._last, now
        return {name: value - last.get(name, 0) for name, value in now.items() if value != last.get(name, 0)}


@pytest.fixture(scope="module")
def encoder() -> Iterator[ServiceProcess]:
    service = ServiceProcess("encoder", str(embedded_checkpoint()), "--port", "0", "--metrics-port", "0")
    yield service
    service.stop()


@pytest.fixture(scope="module")
def caching_model(encoder: ServiceProcess) -> Iterator[ServiceProcess]:
    yield from language_model(encoder)


@pytest.fixture(scope="module")
def forgetful_model(encoder: ServiceProcess) -> Iterator[ServiceProcess]:
    """It keeps neither KV nor, for longer than it must, visual tokens: two slots."""
    yield from language_model(encoder, "--no-enable-prefix-caching", "--visual-store-gib", "1e-9")


def language_model(encoder: ServiceProcess, *more: str) -> Iterator[ServiceProcess]:
    arguments = ("--encoders", encoder.address, "--served-model-name", MODEL, "--num-kv-blocks", "1024")
    ports = ("--port", "0", "--metrics-port", "0")
    service = ServiceProcess("llm", str(embedded_checkpoint()), *ports, *arguments, *more)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def client(caching_model: ServiceProcess) -> Iterator[openai.OpenAI]:
    yield from gateway_client(caching_model)


@pytest.fixture(scope="module")
def forgetful(forgetful_model: ServiceProcess) -> Iterator[openai.OpenAI]:
    yield from gateway_client(forgetful_model)


def gateway_client(model: ServiceProcess) -> Iterator[openai.OpenAI]:
    gateway = ServiceProcess("gateway", "--port", "0", "--llm", model.address)
    try:
        with openai.OpenAI(base_url=f"http://{gateway.address}/v1", api_key="none", timeout=60) as made:
            yield made
    finally:
        gateway.stop()


@pytest.fixture
def encoded(encoder: ServiceProcess) -> Counters:
    return Counters(encoder)


def salted(salt: str) -> dict[str, Any]:
    return {"extra_body": {"cache_salt": salt}}


class TestEncoderCache:
    def test_a_repeated_picture_is_encoded_once_and_answered_the_same(
        self, forgetful: openai.OpenAI, encoded: Counters
    ) -> None:
        messages = about(sign("PARK", TILED[5]), SAY)
        assert answer(forgetful, messages) == "PARK"
        cold = encoded.news()
        assert cold["tessera_encoder_cache_misses"] == NUM_TILES and cold["tessera_encoder_forwards"] >= 1
        assert cold["tessera_encoder_cache_bytes host"] > 0
        assert answer(forgetful, messages) == "PARK"
        assert encoded.news() == {ENCODES: 1, "tessera_encoder_cache_hits host": NUM_TILES}

    def test_only_the_new_picture_of_several_is_encoded(
        self, forgetful: openai.OpenAI, encoded: Counters
    ) -> None:
        known, new = sign("BANK", TILED[3]), sign("EXIT")
        assert answer(forgetful, about(known, SAY)) == "BANK"
        encoded.news()
        ask(forgetful, compare([known, new], SAY))
        news = encoded.news()
        assert news["tessera_encoder_cache_hits host"] == 3 and news["tessera_encoder_cache_misses"] == 1
        assert news["tessera_encoder_forwards"] == 1

    def test_another_salt_finds_nothing(self, forgetful: openai.OpenAI, encoded: Counters) -> None:
        messages = about(sign("HOTEL", TILED[5]), SAY)
        for salt in ("one tenant", "another"):
            assert answer(forgetful, messages, **salted(salt)) == "HOTEL"
            news = encoded.news()
            assert news["tessera_encoder_cache_misses"] == NUM_TILES
            assert "tessera_encoder_cache_hits host" not in news
        assert answer(forgetful, messages, **salted("another")) == "HOTEL"
        assert encoded.news() == {ENCODES: 1, "tessera_encoder_cache_hits host": NUM_TILES}

    def test_another_language_model_finds_what_one_has_had_encoded(
        self, client: openai.OpenAI, forgetful: openai.OpenAI, encoded: Counters
    ) -> None:
        messages = about(sign("MUSEUM", TILED[5]), SAY)
        assert answer(client, messages) == "MUSEUM"
        encoded.news()
        assert answer(forgetful, messages) == "MUSEUM"
        assert encoded.news() == {ENCODES: 1, "tessera_encoder_cache_hits host": NUM_TILES}

    def test_concurrent_duplicates_are_encoded_once(
        self, client: openai.OpenAI, forgetful: openai.OpenAI, encoded: Counters
    ) -> None:
        messages = about(sign("LIBRARY", TILED[5]), SAY)

        async def together() -> list[str]:
            async with (
                openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as one,
                openai.AsyncOpenAI(base_url=forgetful.base_url, api_key="none") as other,
            ):
                create: list[Any] = [one.chat.completions.create, other.chat.completions.create]
                posts = [create[number % 2](messages=messages, **settings()) for number in range(6)]
                return [text_of(completion) for completion in await asyncio.gather(*posts)]

        assert asyncio.run(together()) == ["LIBRARY"] * 6
        assert encoded.news()["tessera_encoder_cache_misses"] == NUM_TILES


class TestPrefixCache:
    def test_a_repeated_picture_costs_no_call_of_an_encoder(
        self, client: openai.OpenAI, encoded: Counters
    ) -> None:
        messages = about(sign("TAXI", TILED[5]), SAY)
        cold = ask(client, messages)
        assert encoded.news()[ENCODES] == 1
        warm = ask(client, messages)
        assert text_of(cold) == text_of(warm) == "TAXI"
        assert cached_tokens(warm) >= image_tokens(warm) > 0
        assert encoded.news() == {}

    def test_the_next_turn_computes_only_its_own_text(self, client: openai.OpenAI, encoded: Counters) -> None:
        messages = about(sign("FRESH\nBREAD", TILED[7]), SAY)
        first = ask(client, messages)
        assert first.usage is not None and text_of(first) == "FRESH BREAD"
        encoded.news()
        then = ask(client, talk(messages, "FRESH BREAD", "What is the first line?"))
        assert then.usage is not None and text_of(then) == "FRESH"
        # All that the first turn has computed, down to a whole block; its last token was never an input.
        computed = first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert cached_tokens(then) == computed // BLOCK_SIZE * BLOCK_SIZE
        assert encoded.news() == {}

    def test_a_new_picture_in_the_next_turn_is_the_only_one_encoded(
        self, client: openai.OpenAI, encoded: Counters
    ) -> None:
        messages = about(sign("CLOSED", TILED[5]), SAY)
        assert answer(client, messages) == "CLOSED"
        encoded.news()
        more = [*talk(messages, "CLOSED"), *about(sign("OPEN"), SAY)]
        second = ask(client, more)
        assert cached_tokens(second) >= image_tokens(second) // (NUM_TILES + 1) * NUM_TILES
        news = encoded.news()
        assert (news["tessera_encoder_forwards"], news["tessera_encoder_cache_misses"]) == (1, 1)

    def test_another_salt_shares_nothing(self, client: openai.OpenAI, encoded: Counters) -> None:
        messages = about(sign("GARDEN", TILED[5]), SAY)
        for salt in ("one tenant", "another"):
            first = ask(client, messages, **salted(salt))
            assert cached_tokens(first) == 0
            assert encoded.news()["tessera_encoder_cache_misses"] == NUM_TILES

    def test_the_visual_store_serves_what_the_prefix_cache_cannot(
        self, client: openai.OpenAI, caching_model: ServiceProcess, encoded: Counters
    ) -> None:
        """Behind another first picture nothing of the KV can be used."""
        counters = Counters(caching_model)
        known = sign("STATION", TILED[5])
        assert answer(client, about(known, SAY)) == "STATION"
        assert counters.news() == {"tessera_llm_visual_store_grants": NUM_TILES}
        encoded.news()
        ask(client, compare([sign("42"), known], SAY))
        assert counters.news() == {
            "tessera_llm_visual_store_grants": 1,
            "tessera_llm_visual_store_hits": NUM_TILES,
        }
        assert encoded.news()["tessera_encoder_cache_misses"] == 1
