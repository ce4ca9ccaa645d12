"""`POST /v1/chat/completions`: read, translate, call, answer whole or as a stream."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.affinity import conversation_key
from gateway.body import read_json_body
from gateway.chunks import ChunkEncoder
from gateway.completion import Completion, Reply
from gateway.config import GatewayConfig
from gateway.conversation import Turn, media_limits, read_conversation
from gateway.disconnect import until_disconnect
from gateway.errors import INTERNAL_MESSAGE, ModelNotFound, RequestError, error_body
from gateway.events import Event
from gateway.llm_client import LLMClient
from gateway.metrics import AnswerTimer, GatewayMetrics
from gateway.model_info import ModelInfo
from gateway.parsing import parse_request
from gateway.schema import ChatCompletionRequest, VideoOptions, unknown_keys
from gateway.streaming import DONE, KEEPALIVE, EventStreamResponse, sse_json
from gateway.translate import generate_request, param_of, uploads_of
from protos.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelError,
    NotFound,
    ServingError,
    Unavailable,
)
from protos.options import MAX_MESSAGE_BYTES
from protos.request_context import Metadata, outgoing_metadata

# A stranger can send any number of different keys; only so many are remembered as logged.
_MAX_LOGGED_KEYS = 256
_MAX_HEADER_CHARS = 512

_MEDIA_CODES = {
    ".image.data": "invalid_image",
    ".video.data": "invalid_video",
    ".document.data": "invalid_file",
}

log = logging.getLogger(__name__)


class ChatCompletions:
    """The route.  One object per application."""

    def __init__(self, config: GatewayConfig, client: LLMClient, metrics: GatewayMetrics) -> None:
        self._config = config
        self._client = client
        self._metrics = metrics
        self._logged_keys: set[str] = set()

    async def create(self, request: Request) -> Response:
        timer = AnswerTimer(self._metrics)
        config = self._config
        body = await read_json_body(request, config.max_body_bytes, config.body_timeout_s)
        chat = parse_request(body, ChatCompletionRequest)
        self._note_unknown(chat)
        model = await self._client.model()
        if chat.model is not None and chat.model != model.id:
            raise ModelNotFound(chat.model)
        limits = media_limits(model, config.max_images, MAX_MESSAGE_BYTES)
        turns = await read_conversation(chat.messages, limits, _video_defaults(chat))
        reply = _reply(chat, model.id, request.state.request_id)
        events = self._events(request, chat, turns, model, timer)
        if chat.stream:
            return EventStreamResponse(chunk_stream(events, _encoder(chat, reply)))
        return JSONResponse(await until_disconnect(request.receive, _collect(events, Completion(reply))))

    async def _events(
        self,
        request: Request,
        chat: ChatCompletionRequest,
        turns: Sequence[Turn],
        model: ModelInfo,
        timer: AnswerTimer,
    ) -> AsyncGenerator[list[Event], None]:
        """Events of the answer as they come; an empty list after a while of silence."""
        request_id, config = request.state.request_id, self._config
        call = self._client.generate(
            generate_request(chat, turns, request_id),
            key=conversation_key(turns, chat.cache_salt or "", chat.prompt_cache_key or ""),
            metadata=_metadata(request_id, request.headers),
            timeout_s=config.request_timeout_s,
            idle_s=config.keepalive_s,
            is_kept=not chat.stream,
            uploads=uploads_of(turns),
        )
        try:
            async with aclosing(call) as batches:
                async for batch in batches:
                    timer.observe(batch)
                    yield batch
        except ServingError as error:
            raise _in_words_of_the_client(error, chat, turns, model) from None

    def _note_unknown(self, chat: ChatCompletionRequest) -> None:
        for key in unknown_keys(chat.model_extra or {}):
            self._metrics.ignored_keys.inc()
            if key not in self._logged_keys and len(self._logged_keys) < _MAX_LOGGED_KEYS:
                self._logged_keys.add(key)
                log.warning("ignoring the unknown request key %r", key[:64])


async def chunk_stream(
    batches: AsyncGenerator[list[Event], None], encoder: ChunkEncoder
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of one answer.  What goes wrong before the first is raised, later it is sent."""
    begun = False
    try:
        async with aclosing(batches) as source:
            async for batch in source:
                data = b"".join(map(encoder.encode, batch))
                if not batch and encoder.is_admitted:
                    data = KEEPALIVE
                if data:
                    begun = True
                    yield data
        yield encoder.end()
    except Exception as error:
        if not begun:
            raise
        yield sse_json(error_body(_logged(error))) + DONE


def _logged(error: Exception) -> ServingError:
    if not isinstance(error, ServingError):
        log.exception("unexpected error in a stream")
        return ModelError(INTERNAL_MESSAGE)
    log.warning("stream broke off: %s", error.message)
    return error


async def _collect(batches: AsyncGenerator[list[Event], None], completion: Completion) -> dict[str, Any]:
    async with aclosing(batches) as source:
        async for batch in source:
            for event in batch:
                completion.add(event)
    return completion.body()


def _video_defaults(chat: ChatCompletionRequest) -> VideoOptions | None:
    return None if chat.media_io_kwargs is None else chat.media_io_kwargs.video


def _reply(chat: ChatCompletionRequest, model: str, request_id: str) -> Reply:
    return Reply(
        id=f"chatcmpl-{request_id}",
        created=int(time.time()),
        model=model,
        num_choices=chat.n or 1,
        logprobs=bool(chat.logprobs),
        service_tier=chat.service_tier,
    )


def _encoder(chat: ChatCompletionRequest, reply: Reply) -> ChunkEncoder:
    options = chat.stream_options
    if options is None:
        return ChunkEncoder(reply)
    return ChunkEncoder(
        reply,
        include_usage=bool(options.include_usage),
        usage_in_chunks=bool(options.continuous_usage_stats),
        details=bool(options.include_details),
    )


def _in_words_of_the_client(
    error: ServingError, chat: ChatCompletionRequest, turns: Sequence[Turn], model: ModelInfo
) -> ServingError:
    """The same error, naming the field of the JSON body instead of the one of the protobuf."""
    if isinstance(error, ContextLengthExceeded):
        # LiteLLM and others recognise an overflow by this sentence.
        limit = f"This model's maximum context length is {model.max_model_len} tokens"
        return ContextLengthExceeded(f"{limit}: {error.message}", field="messages")
    field = error.field or ""
    error.field = param_of(field, chat, turns)
    if type(error) is InvalidRequest:
        code = next((code for end, code in _MEDIA_CODES.items() if field.endswith(end)), None)
        return error if code is None else RequestError(error.message, code=code, param=error.field)
    if isinstance(error, NotFound) and field.endswith(".upload"):  # forgotten, or at another replica
        return Unavailable("The upload was lost on its way; send the request again.", field=error.field)
    return error


# https://www.w3.org/TR/trace-context/: anything else is not worth passing on, and gRPC refuses some of it.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(rf"[\x20-\x7e]{{1,{_MAX_HEADER_CHARS}}}")


def _metadata(request_id: str, headers: Mapping[str, str]) -> Metadata:
    parent, state = headers.get("traceparent", ""), headers.get("tracestate", "")
    if not _TRACEPARENT.fullmatch(parent):
        return outgoing_metadata(request_id)
    trace = [("traceparent", parent)]
    if _TRACESTATE.fullmatch(state):
        trace.append(("tracestate", state))
    return outgoing_metadata(request_id, trace)
