"""The completions route: real HTTP in front, a real gRPC service behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from protos import language_model_pb2 as pb
from protos.errors import ContextLengthExceeded, InvalidRequest, ModelError, Overloaded
from tests.gateway.scripted import (
    MODEL,
    delta,
    finished,
    gateway_before,
    replies,
    says,
    started,
    usage,
)

PATH = "/v1/completions"


def _body(prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def _token(text: str, logprob: float, *top: tuple[str, float]) -> pb.TokenLogprobs:
    def entry(text: str, logprob: float) -> pb.Logprob:
        return pb.Logprob(token_id=1, logprob=logprob, text=text, raw=text.encode())

    return pb.TokenLogprobs(token=entry(text, logprob), top=[entry(*pair) for pair in top])


async def _repeat(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Says its prompt, in each choice."""
    yield started(len(request.prompt_token_ids))
    choices = max(1, request.sampling.n)
    for index in range(choices):
        yield delta("<" + "".join(map(chr, request.prompt_token_ids)), index)
        yield delta(f"{index}>", index)
        yield finished(index)
    yield usage(len(request.prompt_token_ids), 2 * choices, cached=1)


async def test_official_client_gets_a_completion() -> None:
    async with gateway_before(says("upon", " a time")) as gateway:
        answer = await gateway.openai.completions.create(model=MODEL, prompt="Once", max_tokens=5, seed=3)
    (request,) = gateway.llm.requests
    assert bytes(request.prompt_token_ids) == b"Once" and not request.messages
    assert (request.sampling.max_tokens, request.sampling.seed) == (5, 3)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == MODEL
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("upon a time", "stop")
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None and answer.usage.total_tokens == 9


async def test_official_client_streams() -> None:
    async with gateway_before(says("upon", " a time")) as gateway:
        options: Any = {"include_usage": True}
        stream = await gateway.openai.completions.create(
            model=MODEL, prompt="Once", stream=True, stream_options=options
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["upon", " a time", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 9


async def test_stream_ends_with_done_and_has_no_usage_unless_asked() -> None:
    async with gateway_before(says("a")) as gateway:
        response = await gateway.post(_body(stream=True), PATH)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("data: [DONE]\n\n") and "usage" not in response.text


async def test_answers_16_tokens_unless_told_otherwise() -> None:
    async with gateway_before() as gateway:
        await gateway.post(_body(), PATH)
        await gateway.post(_body(max_tokens=None), PATH)
    assert gateway.llm.requests[0].sampling.max_tokens == 16
    assert not gateway.llm.requests[1].sampling.HasField("max_tokens")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([72, 105], ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([[72, 105], [72]], ["Hi", "H"]),
    ],
)
async def test_every_form_of_prompts_is_answered_in_order(prompt: Any, expected: list[str]) -> None:
    async with gateway_before(_repeat) as gateway:
        body = (await gateway.post(_body(prompt, n=2), PATH)).json()
    texts = [f"<{text}{index}>" for text in expected for index in range(2)]
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 2 * len(texts)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == len(expected)


async def test_several_prompts_stream_side_by_side() -> None:
    async with gateway_before(_repeat) as gateway:
        body = _body(["Hi", "Ho"], n=2, stream=True, stream_options={"include_usage": True})
        text = (await gateway.post(body, PATH)).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    texts = {index: "" for index in range(4)}
    reasons = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {0: "<Hi0>", 1: "<Hi1>", 2: "<Ho0>", 3: "<Ho1>"}
    assert sorted(reasons) == [0, 1, 2, 3]
    assert chunks[-1]["usage"]["total_tokens"] == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", [72, 105]])
async def test_echo_begins_every_choice_with_the_prompt(prompt: Any, stream: bool) -> None:
    async with gateway_before(says(" there")) as gateway:
        response = await gateway.post(_body(prompt, echo=True, stream=stream), PATH)
    if not stream:
        assert response.json()["choices"][0]["text"] == "Hi there"
        return
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi", " there", ""]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_parallel_lists(stream: bool) -> None:
    script = replies(
        started(),
        delta("ab", logprobs=[_token("ab", -0.5, ("ab", -0.5), ("x", -1.0))]),
        delta("c", logprobs=[_token("c", float("-inf"), ("y", -0.25))]),
        finished(),
        usage(),
    )
    async with gateway_before(script) as gateway:
        response = await gateway.post(_body(logprobs=2, stream=stream), PATH)
    assert gateway.llm.requests[0].sampling.logprobs == 2
    if stream:
        chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        logprobs = {key: [each for part in parts for each in part[key]] for key in parts[0]}
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"ab": -0.5, "x": -1.0}, {"y": -0.25, "c": -9999.0}],
        "text_offset": [0, 2],
    }


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt.0"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt.1"),
        ({"prompt": 1}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt.0"),
        ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "invalid_value", "prompt"),
        ({"suffix": "x"}, "invalid_value", "suffix"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"echo": True, "logprobs": 1}, "unsupported_parameter", "echo"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
async def test_what_is_wrong_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    async with gateway_before() as gateway:
        status, got, place, message = await gateway.error({**_body(), **fields}, PATH)
    assert (status, got, place) == (404 if code == "model_not_found" else 400, code, param), message
    assert not gateway.llm.requests


async def test_a_missing_prompt_is_named() -> None:
    async with gateway_before() as gateway:
        fault = await gateway.error({"model": MODEL}, PATH)
    assert fault[:3] == (400, "missing_required_parameter", "prompt")


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequest("bad id", field="prompt_token_ids[1]"), 400, "invalid_value", "prompt"),
        (InvalidRequest("bad", field="sampling.min_tokens"), 400, "invalid_value", "min_new_tokens"),
        (ContextLengthExceeded("9 > 8"), 400, "context_length_exceeded", "prompt"),
        (Overloaded("full"), 429, "overloaded", None),
    ],
)
async def test_the_models_errors_name_fields_of_the_body(
    error: Exception, status: int, code: str, param: str | None
) -> None:
    async with gateway_before(replies(error)) as gateway:
        fault = await gateway.error(_body(min_new_tokens=1), PATH)
    assert fault[:3] == (status, code, param)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_an_error_in_a_stream_is_raised_by_the_client(prompt: Any) -> None:
    async with gateway_before(replies(started(), delta("x"), ModelError("secret"))) as gateway:
        stream = await gateway.openai.completions.create(model=MODEL, prompt=prompt, stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for _chunk in stream:
                pass
    assert "secret" not in caught.value.message


async def test_an_error_of_one_prompt_is_the_error_of_the_request() -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.prompt_token_ids[0] == ord("b"):
            raise InvalidRequest("no b", field="prompt_token_ids")
        async for event in _repeat(request):
            yield event

    async with gateway_before(script) as gateway:
        whole = await gateway.error(_body(["a", "b"]), PATH)
    assert whole[:3] == (400, "invalid_value", "prompt")
