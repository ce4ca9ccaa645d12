"""A language-model service that answers as a test scripts it, and a gateway on a real socket before it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import httpx
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from gateway.access import open_key_ring
from gateway.app import bind, create_app, make_server
from gateway.config import GatewayConfig
from gateway.llm_client import LLMClient
from protos import language_model_pb2 as pb
from protos import language_model_pb2_grpc
from protos.errors import InvalidRequest, ServingError
from protos.failures import error_to_failure
from protos.options import SHARED_OPTIONS
from protos.statuses import rpc_errors

MODEL = "org/tiny-vl"
Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]


def started(prompt_tokens: int = 7) -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.Started(request_id="r", prompt_tokens=prompt_tokens))


def delta(
    text: str, index: int = 0, num_tokens: int = 1, logprobs: list[pb.TokenLogprobs] | None = None
) -> pb.GenerateResponse:
    message = pb.Delta(index=index, text=text, token_ids=range(num_tokens), logprobs=logprobs or [])
    return pb.GenerateResponse(delta=message)


def thought(reasoning: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(reasoning=reasoning, token_ids=[0]))


def called(index: int, arguments: str = "", name: str = "") -> pb.GenerateResponse:
    """A piece of a tool call."""
    piece = pb.ToolCallDelta(index=index, name=name, arguments=arguments)
    return pb.GenerateResponse(delta=pb.Delta(tool_calls=[piece], token_ids=[0]))


def finished(index: int = 0, reason: int = pb.FINISH_REASON_STOP) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index, reason=reason))


def usage(prompt: int = 7, completion: int = 2, cached: int = 0, visual: int = 0) -> pb.GenerateResponse:
    message = pb.Usage(
        prompt_tokens=prompt, visual_tokens=visual, cached_tokens=cached, completion_tokens=completion
    )
    return pb.GenerateResponse(usage=message)


def replies(*events: pb.GenerateResponse | Exception) -> Script:
    """A script that says these events, or raises, whatever it is asked."""

    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return script


def says(*texts: str) -> Script:
    return replies(started(), *(delta(text) for text in texts), finished(), usage(completion=len(texts)))


def hangs_after(*events: pb.GenerateResponse) -> Script:
    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        for event in events:
            yield event
        await asyncio.Event().wait()

    return script


def default_info(**changes: Any) -> pb.GetLanguageModelResponse:
    info = {"model": MODEL, "max_model_len": 4096, "max_images": 4, "max_request_bytes": 4 << 20}
    return pb.GetLanguageModelResponse(**{**info, "max_tiles": 12, "encoders_ready": 1, **changes})


class ScriptedLLM(language_model_pb2_grpc.LanguageModelServicer):
    """Records what it is asked; `cancelled` is set when a caller left before the end."""

    def __init__(self, script: Script, info: pb.GetLanguageModelResponse | None = None) -> None:
        self.script = script
        self.info = info or default_info()
        self.answers_get_model = True
        self.dies_with_its_script = (
            False  # an exception in a script breaks the stream, as a killed process does
        )
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.tokenized: list[pb.TokenizeRequest] = []
        self.cancels: list[int] = []
        self.uploads: list[tuple[bytes, bytes]] = []  # (cache salt, data)
        self.upload_error: ServingError | None = None
        self.uploads_begun = 0
        self.takes_uploads = asyncio.Event()  # each waits for this before it is answered
        self.takes_uploads.set()
        self.takes_texts = asyncio.Event()  # each to tokenize waits for this
        self.takes_texts.set()
        self.cancelled = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SessionResponse]:
        """The script of each request; a script that breaks off ends the stream."""
        outbox: asyncio.Queue[pb.SessionEvent | None] = asyncio.Queue()
        running: dict[int, asyncio.Task[None]] = {}
        reading = asyncio.create_task(self._read(requests, running, outbox))
        try:
            while (event := await outbox.get()) is not None:
                yield pb.SessionResponse(events=[event])
            if self.dies_with_its_script:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        finally:
            for task in (reading, *running.values()):
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.SessionRequest],
        running: dict[int, asyncio.Task[None]],
        outbox: asyncio.Queue[pb.SessionEvent | None],
    ) -> None:
        async for message in requests:
            if message.HasField("cancel"):
                self.cancels.append(message.cancel.id)
                running[message.cancel.id].cancel()
            else:
                answering = asyncio.create_task(self._answer(message.generate, outbox))
                running[message.generate.id] = answering

    async def _answer(
        self, generate: pb.SessionGenerate, outbox: asyncio.Queue[pb.SessionEvent | None]
    ) -> None:
        self.requests.append(generate.request)
        self.metadata.append(dict(generate.metadata))
        kind = ""
        try:
            async for event in self.script(generate.request):
                kind = str(event.WhichOneof("event"))
                entry = pb.SessionEvent(id=generate.id)
                getattr(entry, kind).CopyFrom(getattr(event, kind))
                outbox.put_nowait(entry)
            if kind != "usage":
                outbox.put_nowait(None)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        except ServingError as error:
            outbox.put_nowait(pb.SessionEvent(id=generate.id, failure=error_to_failure(error)))
        except Exception:
            outbox.put_nowait(None)  # as if the process had died

    async def UploadMedia(
        self, requests: AsyncIterator[pb.UploadMediaRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.UploadMediaResponse:
        async with rpc_errors(context):
            messages = [message async for message in requests]
            self.uploads_begun += 1
            await self.takes_uploads.wait()
            if self.upload_error is not None:
                raise self.upload_error
            data = b"".join(message.data for message in messages)
            assert messages[0].num_bytes == len(data)
            self.uploads.append((messages[0].cache_salt, data))
            return pb.UploadMediaResponse(upload=hashlib.sha256(data).digest(), num_bytes=len(data))

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        """One id a character; of a conversation, those of its texts."""
        self.tokenized.append(request)
        await self.takes_texts.wait()
        messages = request.messages.messages
        text = request.text or "".join(part.text for each in messages for part in each.parts)
        return pb.TokenizeResponse(token_ids=[ord(char) for char in text])

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DetokenizeResponse:
        async with rpc_errors(context):
            if any(token >= 0x110000 for token in request.token_ids):
                raise InvalidRequest("token_ids[0] must be below 1114112", field="token_ids[0]")
            return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def GetModel(
        self, request: pb.GetLanguageModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLanguageModelResponse:
        if not self.answers_get_model:
            await asyncio.Event().wait()
        return self.info

    async def listen(self, port: int = 0) -> int:
        options = [*SHARED_OPTIONS, ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        language_model_pb2_grpc.add_LanguageModelServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)


@dataclass
class Gateway:
    llm: ScriptedLLM
    llm_port: int
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    anthropic: AsyncAnthropic
    port: int

    async def post(
        self, body: Any = None, path: str = "/v1/chat/completions", **options: Any
    ) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def error(
        self, body: Any, path: str = "/v1/chat/completions"
    ) -> tuple[int, str | None, str | None, str]:
        """(status, code, param, message) of a request that must fail."""
        response = await self.post(body, path)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error["code"], error["param"], error["message"]


@asynccontextmanager
async def serving(*targets: str, config: GatewayConfig | None = None) -> AsyncIterator[int]:
    """A gateway on a free port, in front of `targets`."""
    config = replace(config or GatewayConfig(), port=0, llm=targets, shutdown_grace_s=1)
    client = LLMClient(config.llm, config.llm_tls, model_timeout_s=config.model_timeout_s)
    server = make_server(create_app(config, client, keys=open_key_ring(config)), config)
    listener = bind(config.host, 0)
    port = listener.getsockname()[1]
    task = asyncio.create_task(server.serve([listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield port
    finally:
        server.should_exit = True
        await task
        await client.close()


@asynccontextmanager
async def gateway_before(
    script: Script | None = None,
    info: pb.GetLanguageModelResponse | None = None,
    config: GatewayConfig | None = None,
) -> AsyncIterator[Gateway]:
    llm = ScriptedLLM(script or says("Hello", " there"), info)
    llm_port = await llm.listen()
    try:
        async with serving(f"127.0.0.1:{llm_port}", config=config) as port:
            url = f"http://127.0.0.1:{port}"
            async with (
                httpx.AsyncClient(base_url=url, timeout=30) as http,
                AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai,
                AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as anthropic,
            ):
                yield Gateway(llm, llm_port, http, openai, anthropic, port)
    finally:
        await llm.stop()


def ask(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def ask_about(*images: Any, text: str = "what is this?", **fields: Any) -> dict[str, Any]:
    """A question about pictures; each is an image_url object."""
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": image} for image in images)]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], **fields}
