"""The chat route: real HTTP in front, a real gRPC service behind."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from gateway.answer_stream import answer_stream
from gateway.chunks import ChunkEncoder
from gateway.completion import Reply
from gateway.config import GatewayConfig
from gateway.conversation import UPLOAD_ABOVE_BYTES
from gateway.events import Delta, Event, Finished, Started, Usage
from protos import language_model_pb2 as pb
from protos.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from tests.gateway.scripted import (
    MODEL,
    Script,
    ScriptedLLM,
    ask,
    ask_about,
    default_info,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    says,
    serving,
    started,
    usage,
)
from tests.pictures import data_uri

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
PNG_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def _token(text: str, logprob: float, *top: tuple[str, float]) -> pb.TokenLogprobs:
    def entry(text: str, logprob: float) -> pb.Logprob:
        return pb.Logprob(token_id=1, logprob=logprob, text=text, raw=text.encode())

    return pb.TokenLogprobs(token=entry(text, logprob), top=[entry(*pair) for pair in top])


def _chunks(body: bytes) -> list[Any]:
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    return [
        json.loads(event.removeprefix("data: ")) if event != "data: [DONE]" else None
        for event in events
        if not event.startswith(":")
    ]


async def test_official_client_gets_a_whole_answer() -> None:
    async with gateway_before(
        replies(started(), delta("Hello"), delta(" there"), finished(), usage())
    ) as gateway:
        answer = await gateway.openai.chat.completions.create(**ask())
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60


async def test_official_client_streams() -> None:
    async with gateway_before(says("Hel", "lo", " there")) as gateway:
        stream = await gateway.openai.chat.completions.create(**ask(stream=True))
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there"
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_official_stream_helper_accepts_the_stream() -> None:
    async with gateway_before(says("Hello")) as gateway:
        options = {"include_usage": True}
        async with gateway.openai.chat.completions.stream(**ask(stream_options=options)) as stream:
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"
    assert final.usage is not None and final.usage.total_tokens == 8


async def test_stream_is_byte_exact() -> None:
    async with gateway_before(says("é\u2028\n", '"')) as gateway:
        response = await gateway.post(ask(stream=True), headers={"x-request-id": "abc-1"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "abc-1"
    created = _chunks(response.content)[0]["created"]
    head = 'data: {"id":"chatcmpl-abc-1","object":"chat.completion.chunk",'
    head += f'"created":{created},"model":"{MODEL}",'
    deltas = ['{"role":"assistant","content":""}', '{"content":"\\u00e9\\u2028\\n"}', '{"content":"\\""}']
    choices = [f'{{"index":0,"delta":{each},"logprobs":null,"finish_reason":null}}' for each in deltas]
    choices.append('{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}')
    expected = "".join(f'{head}"choices":[{choice}]}}\n\n' for choice in choices) + "data: [DONE]\n\n"
    assert response.content == expected.encode()


async def test_usage_chunk_comes_last_and_only_when_asked() -> None:
    script = replies(
        started(), delta("a"), finished(), usage(prompt=300, completion=1, cached=16, visual=256)
    )
    async with gateway_before(script) as gateway:
        body = ask(stream=True, stream_options={"include_usage": True})
        *chunks, last, done = _chunks((await gateway.post(body)).content)
        plain = _chunks((await gateway.post(ask(stream=True))).content)
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == [] and done is None
    assert last["usage"] == {
        "prompt_tokens": 300,
        "completion_tokens": 1,
        "total_tokens": 301,
        "prompt_tokens_details": {"cached_tokens": 16, "image_tokens": 256},
    }
    assert not any("usage" in chunk for chunk in plain[:-1])


async def test_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with gateway_before(says("a", "b")) as gateway:
        chunks = _chunks((await gateway.post(ask(stream=True, stream_options=options))).content)[:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {7}


async def test_usage_of_a_whole_answer_has_the_picture_tokens() -> None:
    script = replies(
        started(), delta("a"), finished(), usage(prompt=300, completion=1, cached=16, visual=256)
    )
    async with gateway_before(script) as gateway:
        answer = await gateway.openai.chat.completions.create(**ask())
    assert answer.usage is not None
    assert answer.usage.total_tokens == 301
    details = answer.usage.prompt_tokens_details
    assert details is not None
    assert details.model_dump(include={"cached_tokens", "image_tokens"}) == {
        "cached_tokens": 16,
        "image_tokens": 256,
    }


async def test_n_choices_whole_and_streamed() -> None:
    length = pb.FINISH_REASON_LENGTH
    events = [
        started(),
        delta("x", 1),
        delta("a", 0),
        delta("y", 1),
        finished(1, length),
        finished(0),
        usage(),
    ]
    async with gateway_before(replies(*events)) as gateway:
        answer = await gateway.openai.chat.completions.create(**ask(n=2))
        chunks = _chunks((await gateway.post(ask(n=2, stream=True))).content)[:-1]
        assert gateway.llm.requests[0].sampling.n == 2
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["a", "xy"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices if "role" in choice["delta"]] == [1, 0]
    for index, text, reason in ((0, "a", "stop"), (1, "xy", "length")):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [reason]


async def test_logprobs_of_stream_and_whole_are_the_same() -> None:
    one = _token("He", -0.5, ("He", -0.5), ("Ho", -1.0))
    half = _token("\ufffd", float("-inf"), ("a", -0.25), ("b", -2.0))
    half.token.raw = b"\xc3"
    script = replies(started(), delta("He", logprobs=[one]), delta("", logprobs=[half]), finished(), usage())
    async with gateway_before(script) as gateway:
        body = ask(logprobs=True, top_logprobs=2)
        answer = await gateway.openai.chat.completions.create(**body)
        chunks = _chunks((await gateway.post({**body, "stream": True})).content)[:-1]
        assert gateway.llm.requests[0].sampling.logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    whole = [entry.model_dump() for entry in logprobs.content]
    assert whole == [
        {
            "token": "He",
            "logprob": -0.5,
            "bytes": [72, 101],
            "top_logprobs": [
                {"token": "He", "logprob": -0.5, "bytes": [72, 101]},
                {"token": "Ho", "logprob": -1.0, "bytes": [72, 111]},
            ],
        },
        {
            "token": "\ufffd",
            "logprob": -9999.0,
            "bytes": [0xC3],
            "top_logprobs": [
                {"token": "a", "logprob": -0.25, "bytes": [97]},
                {"token": "b", "logprob": -2.0, "bytes": [98]},
            ],
        },
    ]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == whole


async def test_logprobs_without_alternatives_ask_for_none() -> None:
    script = replies(started(), delta("a", logprobs=[_token("a", -1.0)]), finished(), usage())
    async with gateway_before(script) as gateway:
        body = (await gateway.post(ask(logprobs=True))).json()
        await gateway.post(ask())
        assert gateway.llm.requests[0].sampling.HasField("logprobs")
        assert gateway.llm.requests[0].sampling.logprobs == 0
        assert not gateway.llm.requests[1].sampling.HasField("logprobs")
    assert body["choices"][0]["logprobs"] == {
        "content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}],
        "refusal": None,
    }


async def test_pictures_travel_as_bytes_with_their_tiling() -> None:
    async with gateway_before() as gateway:
        answer = await gateway.openai.chat.completions.create(
            **ask_about(
                {"url": PNG_URI},
                {"url": PNG_URI, "detail": "low"},
                {"url": PNG_URI, "detail": "high"},
                {"url": PNG_URI, "max_dynamic_patch": 6, "min_dynamic_patch": 2, "detail": "auto"},
            )
        )
        [message] = gateway.llm.requests[0].messages
    assert answer.choices[0].message.content == "Hello there"
    text, *images = message.parts
    assert text.text == "what is this?"
    assert [image.image.data for image in images] == [PNG] * 4
    tilings = [image.image.tiling for image in images]
    bounds = [(tiling.HasField("max_tiles"), tiling.min_tiles, tiling.max_tiles) for tiling in tilings]
    assert bounds == [(False, 0, 0), (True, 1, 1), (False, 0, 0), (True, 2, 6)]


async def test_options_for_all_pictures_travel_with_each() -> None:
    async with gateway_before() as gateway:
        options = {"max_dynamic_patch": 4, "use_thumbnail": False}
        body = ask_about(
            {"url": PNG_URI}, {"url": PNG_URI, "max_dynamic_patch": 2}, {"url": PNG_URI, "detail": "low"}
        )
        assert (await gateway.post({**body, "mm_processor_kwargs": options})).status_code == 200
        fault = await gateway.error({**body, "mm_processor_kwargs": {"max_dynamic_patch": 13}})
        assert fault[:3] == (400, "invalid_value", "mm_processor_kwargs.max_dynamic_patch")
        [message] = gateway.llm.requests[0].messages
    tilings = [part.image.tiling for part in message.parts[1:]]
    assert [tiling.max_tiles for tiling in tilings] == [4, 2, 1]
    assert [tiling.use_thumbnail for tiling in tilings] == [False] * 3


async def test_request_id_and_trace_travel_with_the_call() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with gateway_before() as gateway:
        response = await gateway.post(
            ask(), headers={"x-request-id": "my.id", "traceparent": parent, "tracestate": "a=b"}
        )
        made = await gateway.post(ask(), headers={"x-request-id": "not a valid id", "traceparent": "junk"})
        first, second = gateway.llm.metadata
        assert gateway.llm.requests[0].request_id == "my.id"
    assert response.headers["x-request-id"] == first["x-request-id"] == "my.id"
    assert response.json()["id"] == "chatcmpl-my.id"
    assert (first["traceparent"], first["tracestate"]) == (parent, "a=b")
    assert made.headers["x-request-id"] == second["x-request-id"] != "not a valid id"
    assert "traceparent" not in second


async def test_model_may_be_left_out_but_not_be_another() -> None:
    async with gateway_before() as gateway:
        nameless = ask()
        del nameless["model"]
        assert (await gateway.post(nameless)).status_code == 200
        with pytest.raises(openai.NotFoundError) as caught:
            await gateway.openai.chat.completions.create(**{**ask(), "model": "gpt-4o"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "gpt-4o" in caught.value.message


@pytest.mark.parametrize(
    ("failure", "error_class", "status", "code", "param"),
    [
        (
            InvalidRequest("x", field="sampling.temperature"),
            openai.BadRequestError,
            400,
            "invalid_value",
            "temperature",
        ),
        (
            InvalidRequest("not a picture", field="messages[0].parts[1].image.data"),
            openai.BadRequestError,
            400,
            "invalid_image",
            "messages.0.content.1.image_url.url",
        ),
        (
            InvalidRequest("not fetched", field="messages[0].parts[1].image.url"),
            openai.BadRequestError,
            400,
            "invalid_image_url",
            "messages.0.content.1.image_url.url",
        ),
        (ContextLengthExceeded("long"), openai.BadRequestError, 400, "context_length_exceeded", "messages"),
        (NotFound("gone", field="model"), openai.NotFoundError, 404, "model_not_found", None),
        (Overloaded("full", retry_after_s=2.5), openai.RateLimitError, 429, "overloaded", None),
        (Unavailable("no encoder"), openai.InternalServerError, 503, "service_unavailable", None),
        (FingerprintMismatch("x"), openai.InternalServerError, 503, "service_unavailable", None),
        (DeadlineExceeded("slow"), openai.InternalServerError, 504, "timeout", None),
        (ModelError("secret"), openai.InternalServerError, 500, "internal_error", None),
        (Cancelled("x"), openai.APIStatusError, 499, "request_cancelled", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_before_the_first_text_are_http_statuses(
    failure: Exception, error_class: type[Exception], status: int, code: str, param: str | None, stream: bool
) -> None:
    async with gateway_before(replies(started(), failure)) as gateway:
        with pytest.raises(error_class) as caught:
            await gateway.openai.chat.completions.create(**ask_about({"url": PNG_URI}, stream=stream))
    error = caught.value
    assert isinstance(error, openai.APIStatusError)
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert "secret" not in error.message
    retry_after = error.response.headers.get("retry-after")
    assert retry_after == {Overloaded: "3", Unavailable: "1"}.get(type(failure))
    assert error.response.headers.get("x-should-retry") == (
        "false" if isinstance(failure, ModelError | DeadlineExceeded | FingerprintMismatch) else None
    )


async def test_a_prompt_that_is_too_long_is_said_in_the_words_that_clients_look_for() -> None:
    async with gateway_before(replies(ContextLengthExceeded("the prompt has 5000 tokens"))) as gateway:
        message = (await gateway.error(ask()))[3]
    assert message == "This model's maximum context length is 4096 tokens: the prompt has 5000 tokens"


async def test_error_in_the_middle_of_a_stream_reaches_the_client() -> None:
    script = replies(started(), delta("Hel"), ModelError("secret"))
    async with gateway_before(script) as gateway:
        body = (await gateway.post(ask(stream=True))).content
        stream = await gateway.openai.chat.completions.create(**ask(stream=True))
        texts = []
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
    *chunks, error, done = _chunks(body)
    assert len(chunks) == 2 and done is None
    assert error["error"] | {"message": ""} == {
        "message": "",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert b"secret" not in body
    assert texts == ["", "Hel"]
    assert caught.value.code == "internal_error"


@pytest.mark.parametrize(
    "events", [[started(), delta("a")], [started(), delta("a"), finished()], [started(), delta("a"), usage()]]
)
async def test_an_answer_that_breaks_off_is_an_error_and_not_a_short_answer(
    events: list[pb.GenerateResponse],
) -> None:
    async with gateway_before(replies(*events)) as gateway:
        assert (await gateway.post(ask())).status_code == 500
        *_, error, done = _chunks((await gateway.post(ask(stream=True))).content)
    assert error["error"]["code"] == "internal_error" and done is None


async def test_keepalives_fill_silence_once_the_request_is_admitted() -> None:
    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        await asyncio.sleep(0.5)
        yield delta("a")
        await asyncio.sleep(0.5)
        yield finished()
        yield usage()

    async with gateway_before(script, config=GatewayConfig(keepalive_s=0.1)) as gateway:
        body = (await gateway.post(ask(stream=True))).content
    assert body.startswith(b": keepalive\n\n") and b"}\n\n: keepalive\n\n" in body
    assert [chunk and chunk["choices"][0]["delta"].get("content") for chunk in _chunks(body)] == [
        "",
        "a",
        None,
        None,
    ]


async def test_no_keepalive_commits_a_status_before_admission() -> None:
    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await asyncio.sleep(0.3)
        raise Overloaded("queue full")
        yield started()

    async with gateway_before(script, config=GatewayConfig(keepalive_s=0.05)) as gateway:
        assert (await gateway.post(ask(stream=True))).status_code == 429


async def test_deltas_that_are_already_there_leave_in_one_write() -> None:
    async def batches() -> AsyncGenerator[list[Event], None]:
        deltas = [Delta(0, letter, 1) for letter in "abc"]
        yield [Started(7), *deltas, Finished(0, "stop"), Usage(7, 3)]

    encoder = ChunkEncoder(Reply("chatcmpl-1", 0, MODEL, 1))
    writes = [data async for data in answer_stream(batches(), encoder)]
    assert len(writes) == 2
    assert [chunk["choices"][0]["delta"].get("content") for chunk in _chunks(writes[0])] == ["", *"abc", None]
    assert writes[1] == b"data: [DONE]\n\n"


async def test_leaving_a_stream_cancels_the_call_at_once() -> None:
    async with gateway_before(hangs_after(started(), delta("a"))) as gateway:
        async with gateway.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as response:
            assert "role" in await anext(response.aiter_text())
        async with asyncio.timeout(10):
            await gateway.llm.cancelled.wait()
        page = (await gateway.http.get("/metrics")).text
    assert "tessera_gateway_disconnects_total 1.0" in page


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_text_cancels_the_call_at_once(stream: bool) -> None:
    async with gateway_before(hangs_after(started())) as gateway:
        asking = asyncio.create_task(gateway.post(ask(stream=stream)))
        while not gateway.llm.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        async with asyncio.timeout(10):
            await gateway.llm.cancelled.wait()
        page = (await gateway.http.get("/metrics")).text
    assert 'tessera_gateway_requests_total{route="/v1/chat/completions",status="499"} 1.0' in page


async def test_a_request_has_a_deadline() -> None:
    async with gateway_before(hangs_after(started()), config=GatewayConfig(request_timeout_s=0.3)) as gateway:
        assert (await gateway.error(ask()))[:2] == (504, "timeout")
        async with asyncio.timeout(10):
            await gateway.llm.cancelled.wait()


async def test_a_backend_that_went_away_is_503_and_found_again_on_its_port() -> None:
    async with gateway_before() as gateway:
        assert (await gateway.post(ask())).status_code == 200
        await gateway.llm.stop()
        status, code, param, message = await gateway.error(ask())
        assert (status, code, param) == (503, "service_unavailable", None)
        assert "127.0.0.1" not in message
        await gateway.llm.listen(gateway.llm_port)
        async with asyncio.timeout(5):
            while (await gateway.post(ask())).status_code != 200:
                await asyncio.sleep(0.05)


async def test_a_stream_whose_backend_dies_ends_with_an_error() -> None:
    async with gateway_before(hangs_after(started(), delta("a"))) as gateway:
        async with gateway.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as response:
            pieces = response.aiter_bytes()
            body = await anext(pieces)
            await gateway.llm.stop()
            body += b"".join([piece async for piece in pieces])
    *_, error, done = _chunks(body)
    assert error["error"]["code"] in ("service_unavailable", "request_cancelled") and done is None


async def test_unknown_keys_are_ignored_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway_before() as gateway:
        for _ in range(2):
            assert (await gateway.post(ask(brand_new_option=1, user="me", store=True))).status_code == 200
        page = (await gateway.http.get("/metrics")).text
    assert "tessera_gateway_ignored_keys_total 2.0" in page
    assert sum("brand_new_option" in record.getMessage() for record in caplog.records) == 1
    assert "'user'" not in caplog.text


async def test_service_tier_is_said_only_when_asked() -> None:
    async with gateway_before() as gateway:
        asked = await gateway.post(ask(service_tier="auto"))
        plain = await gateway.post(ask())
    assert asked.json()["service_tier"] == "default"
    assert "service_tier" not in plain.json()


async def test_all_pictures_share_one_budget() -> None:
    async with gateway_before(info=default_info(max_request_bytes=25)) as gateway:
        assert (await gateway.post(ask_about({"url": PNG_URI}))).status_code == 200
        status, code, param, _ = await gateway.error(ask_about({"url": PNG_URI}, {"url": PNG_URI}))
    assert (status, code, param) == (400, "image_file_too_large", "messages.0.content.2.image_url.url")


class TestALanguageModelThatDies:
    """Two services; the one that is asked first dies after some events."""

    @staticmethod
    @asynccontextmanager
    async def scene(*events: pb.GenerateResponse) -> AsyncIterator[httpx.AsyncClient]:
        def make(number: int) -> Script:
            async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
                asked.append(number)
                if len(asked) > 1:
                    for event in (started(), delta("whole"), finished(), usage()):
                        yield event
                    return
                for event in events:
                    yield event
                raise OSError("killed")

            return script

        asked: list[int] = []
        services = [ScriptedLLM(make(number)) for number in range(2)]
        ports = [await service.listen() for service in services]
        for service in services:
            service.dies_with_its_script = True
        try:
            async with serving(*(f"127.0.0.1:{port}" for port in ports)) as port:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                    yield client
        finally:
            for service in services:
                await service.stop()

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("events", [[], [started()], [started(), delta("")]], ids=len)
    async def test_before_any_text_is_not_noticed(
        self, events: list[pb.GenerateResponse], stream: bool
    ) -> None:
        async with self.scene(*events) as client:
            response = await client.post("/v1/chat/completions", json=ask(stream=stream))
        assert response.status_code == 200 and response.text.count("whole") == 1
        assert "error" not in response.text

    async def test_with_half_of_a_whole_answer_is_not_noticed_either(self) -> None:
        async with self.scene(started(), delta("ha"), delta("lf")) as client:
            response = await client.post("/v1/chat/completions", json=ask())
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("whole", "stop")

    async def test_in_the_middle_of_a_stream_ends_it_with_an_error(self) -> None:
        async with self.scene(started(), delta("ha")) as client:
            response = await client.post("/v1/chat/completions", json=ask(stream=True))
        *chunks, error = _chunks(response.content)[:-1]
        assert response.status_code == 200 and len(chunks) == 2
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert "not reachable" in error["error"]["message"]


def video_about(data: bytes, **fields: Any) -> dict[str, Any]:
    part = {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4")}}
    return {"messages": [{"role": "user", "content": [part]}], **fields}


class TestVideos:
    async def test_a_small_one_goes_with_the_request(self) -> None:
        async with gateway_before() as gateway:
            response = await gateway.post(video_about(b"mp4", media_io_kwargs={"video": {"num_frames": 3}}))
            assert response.status_code == 200
            [part] = gateway.llm.requests[0].messages[0].parts
            assert (part.video.data, part.video.sampling.num_frames) == (b"mp4", 3)
            assert not gateway.llm.uploads

    async def test_a_large_one_is_uploaded_first_under_the_requests_salt(self) -> None:
        data = bytes(UPLOAD_ABOVE_BYTES + 1)
        async with gateway_before(info=default_info(max_upload_bytes=8 << 20)) as gateway:
            response = await gateway.post(video_about(data, cache_salt="s"))
            assert response.status_code == 200
            assert gateway.llm.uploads == [(b"s", data)]
            [part] = gateway.llm.requests[0].messages[0].parts
            assert part.video.upload == hashlib.sha256(data).digest() and not part.video.data

    async def test_an_upload_that_is_refused_is_the_requests_error(self) -> None:
        data = bytes(UPLOAD_ABOVE_BYTES + 1)
        async with gateway_before(info=default_info(max_upload_bytes=8 << 20)) as gateway:
            gateway.llm.upload_error = Overloaded("no room", retry_after_s=1)
            status, code, _, message = await gateway.error(video_about(data))
            assert (status, code, message) == (429, "overloaded", "no room")
            gateway.llm.upload_error = None
            assert (await gateway.post(video_about(data))).status_code == 200

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (InvalidRequest("bad", field="messages[0].parts[0].video.data"), 400, "invalid_video"),
            (NotFound("gone", field="messages[0].parts[0].video.upload"), 503, "service_unavailable"),
        ],
    )
    async def test_what_the_service_finds_names_the_part(
        self, error: ServingError, status: int, code: str
    ) -> None:
        async with gateway_before(replies(error)) as gateway:
            found = await gateway.error(video_about(b"mp4"))
            assert found[:3] == (status, code, "messages.0.content.0.video_url.url")
