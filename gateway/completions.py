"""`POST /v1/completions`: finished prompts, as texts or token ids, each answered by a call of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.answer_stream import answer_stream
from gateway.completion import usage_json
from gateway.completions_schema import CompletionRequest
from gateway.disconnect import until_disconnect
from gateway.events import Batches
from gateway.generation import Generator, collect
from gateway.llm_client import LLMClient
from gateway.merging import added, merged
from gateway.model_info import ModelInfo
from gateway.streaming import EventStreamResponse
from gateway.text_completion import TextChunkEncoder, TextCompletion, TextReply


class Completions:
    """The route.  One object per application."""

    def __init__(self, generator: Generator, client: LLMClient) -> None:
        self._generator = generator
        self._client = client

    async def create(self, request: Request) -> Response:
        completion = await self._generator.read(request, CompletionRequest)
        model = await self._generator.model(completion.model)
        work = self._prepared(request, completion, model)
        answers, reply = await until_disconnect(request.receive, work)
        if completion.stream:
            return EventStreamResponse(_stream(answers, completion, reply))
        return JSONResponse(await until_disconnect(request.receive, _whole(answers, reply)))

    async def _prepared(
        self, request: Request, completion: CompletionRequest, model: ModelInfo
    ) -> tuple[list[Batches], TextReply]:
        """The answer of each prompt, not asked for yet, and what all parts of them repeat."""
        prompts = completion.prompts
        timers = [self._generator.timer() for _ in prompts]
        ids = [await self._client.tokenize(each) if isinstance(each, str) else each for each in prompts]
        echoes: list[str] = []
        if completion.echo:
            echoes = [
                each if isinstance(each, str) else await self._client.detokenize(each) for each in prompts
            ]
        reply = TextReply(
            id=f"cmpl-{request.state.request_id}",
            created=int(time.time()),
            model=model.id,
            choices_a_prompt=completion.n or 1,
            echoes=tuple(echoes) or ("",) * len(prompts),
            logprobs=completion.logprobs is not None,
        )
        answers = [
            self._generator.answer_prompt(request, completion, prompt, model, timer)
            for prompt, timer in zip(ids, timers, strict=True)
        ]
        return answers, reply


def _stream(
    answers: Sequence[Batches], completion: CompletionRequest, reply: TextReply
) -> AsyncGenerator[bytes, None]:
    options = completion.stream_options
    include_usage = options is not None and bool(options.include_usage)
    usage_in_chunks = include_usage and bool(options and options.continuous_usage_stats)
    events = merged(answers, reply.choices_a_prompt)
    encoder = TextChunkEncoder(reply, include_usage=include_usage, usage_in_chunks=usage_in_chunks)
    return answer_stream(events, encoder)


async def _whole(answers: Sequence[Batches], reply: TextReply) -> dict[str, Any]:
    collecting = [collect(batches, TextCompletion(reply, prompt)) for prompt, batches in enumerate(answers)]
    tasks = [asyncio.create_task(each) for each in collecting]
    try:
        completions = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finished = [completion.finished() for completion in completions]
    choices = [choice for each, _ in finished for choice in each]
    usage = added(usage for _, usage in finished)
    return {**reply.head(), "choices": choices, "usage": usage_json(usage)}
