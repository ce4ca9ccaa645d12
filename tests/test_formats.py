"""Both checkpoint formats through real processes: random tiny weights, so text is only compared with text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.pictures import image_part, picture, text_part, user
from tests.processes import Stack


@pytest.fixture(scope="module", params=["chat", "hf"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Once in the original format, once in the -HF one."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("formats"), "qwen3", request.param)
    with Stack(checkpoint, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any, **more: Any) -> Any:
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, **more}
    return client.chat.completions.create(messages=messages, **settings)


def image_tokens(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.model_dump()["image_tokens"])


def test_streaming_gives_the_text_of_not_streaming(client: openai.OpenAI) -> None:
    messages = user(image_part(picture(1, 300, 200)), text_part("What is in the picture?"))
    whole = ask(client, messages)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


def test_several_pictures_and_their_tokens_are_counted(client: openai.OpenAI) -> None:
    one = ask(client, user(image_part(picture(2)), text_part("Which?")))
    both = user(image_part(picture(2)), text_part("or"), image_part(picture(3)), text_part("?"))
    two = ask(client, both)
    assert 0 < image_tokens(one) < image_tokens(two) < two.usage.prompt_tokens


def test_max_dynamic_patch_belongs_to_its_picture(client: openai.OpenAI) -> None:
    wide = picture(4, 900, 100)
    free, one, six = (
        image_tokens(ask(client, user(image_part(wide, **options), text_part("?"))))
        for options in ({}, {"max_dynamic_patch": 1}, {"max_dynamic_patch": 6})
    )
    assert one < six < free


def test_the_same_prompt_reuses_its_kv_and_answers_the_same(client: openai.OpenAI) -> None:
    messages = user(image_part(picture(5)), text_part("again?"))
    first, second = ask(client, messages), ask(client, messages)
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second)]
    # The system message may be there from other prompts.
    assert cached[1] >= cached[0] + image_tokens(first)
    assert first.choices[0].message.content == second.choices[0].message.content


def test_another_picture_gives_another_answer(client: openai.OpenAI) -> None:
    answers = [ask(client, user(image_part(picture(seed)), text_part("compare"))) for seed in (6, 7)]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content


def test_many_at_once_answer_as_alone(stack: Stack, client: openai.OpenAI) -> None:
    prompts = [
        user(
            *([image_part(picture(20 + number, 200, 150))] if number % 2 else []),
            text_part(f"no {number}"),
        )
        for number in range(8)
    ]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as many:
            create: Any = many.chat.completions.create
            posts = [create(model="tiny", messages=p, max_tokens=16, temperature=0) for p in prompts]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*posts)]

    alone = [ask(client, prompt, max_tokens=16).choices[0].message.content for prompt in prompts]
    assert asyncio.run(together()) == alone


def test_choices_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    """Random weights are unsure of every token, so what is drawn shows."""
    settings: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.5}
    runs = [ask(client, user(text_part("dice")), **settings) for _ in range(2)]
    texts = [[choice.message.content for choice in run.choices] for run in runs]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert runs[0].usage.completion_tokens == 36


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    answer = ask(client, user(text_part("say")), logit_bias={"65": 100}, max_tokens=4)
    assert len(set(answer.choices[0].message.content)) == 1
