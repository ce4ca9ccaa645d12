"""`POST /v1/chat/completions`: read, translate, call, answer whole or as a stream."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.answer_stream import answer_stream
from gateway.chunks import ChunkEncoder
from gateway.completion import Completion, Reply
from gateway.disconnect import until_disconnect
from gateway.generation import Generator, collect
from gateway.schema import ChatCompletionRequest
from gateway.streaming import EventStreamResponse


class ChatCompletions:
    """The route.  One object per application."""

    def __init__(self, generator: Generator, *, also_reasoning: bool = False) -> None:
        """`also_reasoning`: say what the model thinks under vLLM's newer name, too."""
        self._generator = generator
        self._reasoning_keys = (
            ("reasoning_content", "reasoning") if also_reasoning else ("reasoning_content",)
        )

    async def create(self, request: Request) -> Response:
        timer = self._generator.timer()
        chat = await self._generator.read(request, ChatCompletionRequest)
        model = await self._generator.model(chat.model)
        turns = await self._generator.turns(chat, model)
        reply = self._reply(chat, model.id, request.state.request_id)
        events = self._generator.answer_chat(request, chat, turns, model, timer)
        if chat.stream:
            return EventStreamResponse(answer_stream(events, _encoder(chat, reply)))
        whole = await until_disconnect(request.receive, collect(events, Completion(reply)))
        return JSONResponse(whole.body())

    def _reply(self, chat: ChatCompletionRequest, model: str, request_id: str) -> Reply:
        return Reply(
            id=f"chatcmpl-{request_id}",
            created=int(time.time()),
            model=model,
            num_choices=chat.n or 1,
            logprobs=bool(chat.logprobs),
            service_tier=chat.service_tier,
            reasoning_keys=self._reasoning_keys,
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
