"""The whole path with the official client: gateway, language model and encoder as real processes."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.pictures import data_uri, image_part, picture, text_part, user
from tests.processes import ServiceProcess, Stack


@pytest.fixture(scope="module", params=["chat", "hf"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Once in the original format, once in the -HF one."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("e2e"), "qwen3", request.param)
    with Stack(checkpoint, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, messages: Any, **more: Any) -> Any:
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, **more}
    return client.chat.completions.create(messages=messages, **settings)


class TestAnswers:
    def test_streaming_gives_the_text_of_not_streaming(self, client: openai.OpenAI) -> None:
        messages = user(image_part(picture(1, 300, 200)), text_part("What is in the picture?"))
        whole = ask(client, messages)
        chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == whole.choices[0].message.content != ""
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
        assert whole.choices[0].finish_reason == "length"

    def test_several_pictures_and_their_tokens_are_counted(self, client: openai.OpenAI) -> None:
        one = ask(client, user(image_part(picture(2)), text_part("Which?")))
        two = ask(
            client, user(image_part(picture(2)), text_part("or"), image_part(picture(3)), text_part("?"))
        )
        tokens = [answer.usage.prompt_tokens_details.model_dump()["image_tokens"] for answer in (one, two)]
        assert 0 < tokens[0] < tokens[1] < two.usage.prompt_tokens

    def test_max_dynamic_patch_belongs_to_its_picture(self, client: openai.OpenAI) -> None:
        wide = picture(4, 900, 100)
        usages = [
            ask(client, user(image_part(wide, **options), text_part("?"))).usage
            for options in ({}, {"max_dynamic_patch": 1}, {"max_dynamic_patch": 6})
        ]
        tokens = [usage.prompt_tokens_details.model_dump()["image_tokens"] for usage in usages]
        assert tokens[1] < tokens[2] < tokens[0]

    def test_the_same_prompt_reuses_its_kv_and_answers_the_same(self, client: openai.OpenAI) -> None:
        messages = user(image_part(picture(5)), text_part("again?"))
        first, second = ask(client, messages), ask(client, messages)
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second)]
        visual = first.usage.prompt_tokens_details.model_dump()["image_tokens"]
        assert cached[1] >= cached[0] + visual  # the system message may be there from other prompts
        assert first.choices[0].message.content == second.choices[0].message.content

    def test_another_picture_gives_another_answer_and_shares_no_visual_token(
        self, client: openai.OpenAI
    ) -> None:
        answers = [ask(client, user(image_part(picture(seed)), text_part("compare"))) for seed in (6, 7)]
        assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
        usage = answers[1].usage
        visual = usage.prompt_tokens_details.model_dump()["image_tokens"]
        assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens - visual

    def test_many_at_once_answer_as_alone(self, stack: Stack, client: openai.OpenAI) -> None:
        prompts = [
            user(
                *([image_part(picture(20 + number, 200, 150))] if number % 2 else []),
                text_part(f"no {number}"),
            )
            for number in range(8)
        ]

        async def together() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as many:
                answers = [
                    many.chat.completions.create(model="tiny", messages=p, max_tokens=16, temperature=0)
                    for p in prompts
                ]
                return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*answers)]

        alone = [ask(client, prompt, max_tokens=16).choices[0].message.content for prompt in prompts]
        assert asyncio.run(together()) == alone


class TestSampling:
    def test_n_choices_with_a_seed_differ_and_repeat(self, client: openai.OpenAI) -> None:
        settings: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.5}
        runs = [ask(client, user(text_part("dice")), **settings) for _ in range(2)]
        texts = [[choice.message.content for choice in run.choices] for run in runs]
        assert texts[0] == texts[1] and len(set(texts[0])) == 3
        assert runs[0].usage.completion_tokens == 36

    def test_a_stop_string_is_cut_and_named(self, client: openai.OpenAI) -> None:
        text = ask(client, user(text_part("stop here")), max_tokens=24).choices[0].message.content
        printable = [part for part in range(2, len(text) - 3) if text[part : part + 3].isprintable()]
        stop = text[printable[0] : printable[0] + 3]
        cut = ask(client, user(text_part("stop here")), max_tokens=24, stop=stop).choices[0]
        assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"

    def test_logprobs_cover_every_token(self, client: openai.OpenAI) -> None:
        answer = ask(client, user(text_part("numbers")), logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs.content
        assert len(entries) == answer.usage.completion_tokens
        for entry in entries:
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert entry.logprob == pytest.approx(values[0])  # greedy
        raw = b"".join(bytes(entry.bytes) for entry in entries)
        assert raw.decode("utf-8", "replace") == answer.choices[0].message.content

    def test_logit_bias_forces_a_token(self, client: openai.OpenAI) -> None:
        answer = ask(client, user(text_part("say")), logit_bias={"65": 100}, max_tokens=4)
        assert len(set(answer.choices[0].message.content)) == 1


class TestErrors:
    def test_an_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, user(text_part("x")), model="other")
        assert caught.value.code == "model_not_found"

    def test_a_bad_picture_while_streaming_is_a_real_status(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(image_part(picture(8)[:-300])), stream=True)
        assert caught.value.param is not None and caught.value.param.startswith("messages.0.content.0")

    def test_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(text_part("word " * 30_000)))
        assert caught.value.code == "context_length_exceeded"

    def test_a_url_is_refused_by_name(self, client: openai.OpenAI) -> None:
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(part))
        assert caught.value.param == "messages.0.content.0.image_url.url"


class TestOperations:
    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"

    def test_metrics_count_requests(self, stack: Stack, client: openai.OpenAI) -> None:
        ask(client, user(text_part("count me")))
        page = httpx.get(f"{stack.url}/metrics").text
        assert "tessera_gateway" in page

    def test_ready_follows_the_encoder(self, stack: Stack) -> None:
        assert httpx.get(f"{stack.url}/ready").status_code == 200
        stack.encoder.kill()
        try:
            deadline = time.monotonic() + 5
            while (ready := httpx.get(f"{stack.url}/ready")).status_code == 200:
                assert time.monotonic() < deadline, "still ready without an encoder"
                assert httpx.get(f"{stack.url}/health").status_code == 200
                time.sleep(0.05)
            assert ready.status_code == 503 and "encoder" in ready.text
        finally:
            stack.restart_encoder()
        stack.wait_ready()


def test_data_uris_may_name_another_type(client: openai.OpenAI) -> None:
    """Content decides what a picture is, not what the client calls it."""
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(9), "image/jpeg")}}
    assert ask(client, user(part, text_part("?"))).choices[0].message.content
    assert base64.b64decode(part["image_url"]["url"].partition(",")[2]) == picture(9)


def test_a_second_front_end_shares_the_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two LLM services, one engine: the second joins at the socket and finds the first one's prefix cache."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoint = make_checkpoint(folder / "model", "qwen3", "chat")
    socket = str(folder / "engine.sock")
    with Stack(checkpoint, "--engine-socket", socket) as stack:
        arguments = ("--encoders", stack.encoder.address, "--engine-socket", socket, "--port", "0")
        second = ServiceProcess("llm", str(checkpoint), *arguments)
        gateway = ServiceProcess("gateway", "--port", "0", "--llm", second.address)
        try:
            body = {
                "messages": user(image_part(picture(10)), text_part("both")),
                "temperature": 0,
                "max_tokens": 8,
            }
            answers = [
                httpx.post(f"http://{address}/v1/chat/completions", json=body, timeout=60).json()
                for address in (stack.gateway.address, gateway.address)
            ]
        finally:
            gateway.stop()
            second.stop()
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[1]
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
