"""What every endpoint that generates shares: a body read, a model found, the one way to an answer.

Knows no endpoint's own shape of an answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request

from gateway.access import charge
from gateway.affinity import conversation_key, prompt_key
from gateway.body import read_json_body
from gateway.completions_schema import CompletionRequest
from gateway.config import GatewayConfig
from gateway.conversation import MediaDefaults, Turn, media_limits, read_conversation
from gateway.errors import ModelNotFound, RequestError
from gateway.events import Batches, Event
from gateway.llm_client import LLMClient
from gateway.metrics import AnswerTimer, GatewayMetrics
from gateway.model_info import ModelInfo
from gateway.parsing import Model, parse_request
from gateway.schema import ChatCompletionRequest, MmProcessorKwargs, VideoOptions, unknown_keys
from gateway.translate import generate_request, param_of, prompt_param_of, prompt_request, uploads_of
from protos.errors import ContextLengthExceeded, InvalidRequest, NotFound, ServingError, Unavailable
from protos.options import MAX_MESSAGE_BYTES
from protos.request_context import Metadata, outgoing_metadata

if TYPE_CHECKING:
    from protos import language_model_pb2

# A stranger can send any number of different keys; only so many are remembered as logged.
_MAX_LOGGED_KEYS = 256
_MAX_HEADER_CHARS = 512

_MEDIA_CODES = {
    ".image.url": "invalid_image_url",
    ".video.url": "invalid_video_url",
    ".document.url": "invalid_file_url",
    ".image.data": "invalid_image",
    ".video.data": "invalid_video",
    ".document.data": "invalid_file",
}

Reword = Callable[[ServingError], ServingError]

log = logging.getLogger(__name__)


class Generator:
    """One object per application, shared by its endpoints."""

    def __init__(self, config: GatewayConfig, client: LLMClient, metrics: GatewayMetrics) -> None:
        self._config = config
        self._client = client
        self._metrics = metrics
        self._logged_keys: set[str] = set()

    def timer(self) -> AnswerTimer:
        """Of one request, from now on."""
        return AnswerTimer(self._metrics)

    async def read(self, request: Request, kind: type[Model]) -> Model:
        """The body, checked.

        Raises:
            RequestError: names the first field at fault.
        """
        body = await read_json_body(request, self._config.max_body_bytes, self._config.body_timeout_s)
        parsed = parse_request(body, kind)
        self._note_unknown(parsed.model_extra or {})
        return parsed

    async def model(self, name: str | None) -> ModelInfo:
        """What is served; raises ModelNotFound where the request names something else."""
        model = await self._client.model()
        if name is not None and name != model.id:
            raise ModelNotFound(name)
        return model

    async def turns(self, chat: ChatCompletionRequest, model: ModelInfo) -> tuple[Turn, ...]:
        """The conversation with its media decoded from base64; raises RequestError."""
        limits = media_limits(model, self._config.max_images, MAX_MESSAGE_BYTES)
        return await read_conversation(chat.messages, limits, _media_defaults(chat))

    def answer_chat(
        self,
        request: Request,
        chat: ChatCompletionRequest,
        turns: Sequence[Turn],
        model: ModelInfo,
        timer: AnswerTimer,
    ) -> Batches:
        """Events of the answer as they come; an empty list after a while of silence."""
        return self._events(
            request,
            generate_request(chat, turns, request.state.request_id),
            key=conversation_key(turns, chat.cache_salt or "", chat.prompt_cache_key or ""),
            timer=timer,
            is_kept=not chat.stream,
            uploads=uploads_of(turns),
            reword=lambda error: _in_words_of_chat(error, chat, turns, model),
        )

    def answer_prompt(
        self,
        request: Request,
        completion: CompletionRequest,
        prompt: Sequence[int],
        model: ModelInfo,
        timer: AnswerTimer,
    ) -> Batches:
        """The same for the token ids of a finished prompt."""

        def reword(error: ServingError) -> ServingError:
            if isinstance(error, ContextLengthExceeded):
                return _overflow(error, model, "prompt")
            error.field = prompt_param_of(error.field or "", completion)
            return error

        return self._events(
            request,
            prompt_request(completion, prompt, request.state.request_id),
            key=prompt_key(prompt, completion.cache_salt or "", completion.prompt_cache_key or ""),
            timer=timer,
            is_kept=not completion.stream,
            reword=reword,
        )

    async def _events(
        self,
        request: Request,
        message: language_model_pb2.GenerateRequest,
        *,
        key: bytes,
        timer: AnswerTimer,
        is_kept: bool,
        reword: Reword,
        uploads: Sequence[bytes] = (),
    ) -> Batches:
        call = self._client.generate(
            message,
            key=key,
            metadata=_metadata(request.state.request_id, request.headers),
            timeout_s=self._config.request_timeout_s,
            idle_s=self._config.keepalive_s,
            is_kept=is_kept,
            uploads=uploads,
        )
        try:
            async with aclosing(call) as batches:
                async for batch in batches:
                    timer.observe(batch)
                    charge(request.state, batch)
                    yield batch
        except ServingError as error:
            raise reword(error) from None

    def _note_unknown(self, extra: Mapping[str, Any]) -> None:
        unknown = unknown_keys(extra)
        self._metrics.ignored_keys.inc(len(unknown))
        for key in unknown[:_MAX_LOGGED_KEYS]:
            if key not in self._logged_keys and len(self._logged_keys) < _MAX_LOGGED_KEYS:
                self._logged_keys.add(key)
                log.warning("ignoring the unknown request key %r", key[:64])


def _media_defaults(chat: ChatCompletionRequest) -> MediaDefaults:
    video = chat.media_io_kwargs and chat.media_io_kwargs.video
    return MediaDefaults(video or VideoOptions(), chat.mm_processor_kwargs or MmProcessorKwargs())


class Collector(Protocol):
    def add(self, event: Event) -> object: ...


Collected = TypeVar("Collected", bound=Collector)


async def collect(batches: Batches, collector: Collected) -> Collected:
    """`collector` with the whole answer in it."""
    async with aclosing(batches) as source:
        async for batch in source:
            for event in batch:
                collector.add(event)
    return collector


def _overflow(error: ServingError, model: ModelInfo, field: str) -> ContextLengthExceeded:
    # LiteLLM and others recognise an overflow by this sentence.
    limit = f"This model's maximum context length is {model.max_model_len} tokens"
    return ContextLengthExceeded(f"{limit}: {error.message}", field=field)


def _in_words_of_chat(
    error: ServingError, chat: ChatCompletionRequest, turns: Sequence[Turn], model: ModelInfo
) -> ServingError:
    """The same error, naming the field of the JSON body instead of the one of the protobuf."""
    if isinstance(error, ContextLengthExceeded):
        return _overflow(error, model, "messages")
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
