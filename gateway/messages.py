"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API, answered by the same chat."""

from __future__ import annotations

from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.access import charge_tokens
from gateway.answer_stream import answer_stream
from gateway.conversation import Text, Turn
from gateway.disconnect import until_disconnect
from gateway.events import Batches, Started
from gateway.generation import Generator, collect
from gateway.llm_client import LLMClient
from gateway.message_object import MessageEncoder, MessageObject
from gateway.messages_schema import CountTokensRequest, MessagesRequest, adapt_messages
from gateway.streaming import EventStreamResponse
from protos.errors import ModelError


class Messages:
    """The routes.  One object per application."""

    def __init__(self, generator: Generator, client: LLMClient) -> None:
        self._generator = generator
        self._client = client

    async def create(self, request: Request) -> Response:
        timer = self._generator.timer()
        body = await self._generator.read(request, MessagesRequest)
        model = await self._generator.model(body.model)
        chat, adaptation = adapt_messages(body)
        with adaptation.reworded():
            turns = await self._generator.turns(chat, model)
            answer = self._generator.answer_chat(request, chat, turns, model, timer)
        events = adaptation.events(answer)
        message = MessageObject(request.state.request_id, model.id)
        if body.stream:
            return EventStreamResponse(answer_stream(events, MessageEncoder(message)))
        whole = await until_disconnect(request.receive, collect(events, message))
        return JSONResponse(whole.body())

    async def count_tokens(self, request: Request) -> Response:
        """With pictures the request is begun and given up, as with tools: only so is all in the prompt."""
        timer = self._generator.timer()
        body = await self._generator.read(request, CountTokensRequest)
        model = await self._generator.model(body.model)
        chat, adaptation = adapt_messages(body)
        with adaptation.reworded():
            turns = await self._generator.turns(chat, model)
            if not chat.tools and chat.thinking is None and all(_is_text(turn) for turn in turns):
                num_tokens = len(await self._client.tokenize(turns))
                charge_tokens(request.state, num_tokens)
                return JSONResponse({"input_tokens": num_tokens})
            answer = self._generator.answer_chat(request, chat, turns, model, timer)
        work = _prompt_tokens(adaptation.events(answer))
        return JSONResponse({"input_tokens": await until_disconnect(request.receive, work)})


def _is_text(turn: Turn) -> bool:
    return not turn.calls and all(isinstance(part, Text) for part in turn.parts)


async def _prompt_tokens(events: Batches) -> int:
    async with aclosing(events) as batches:
        async for batch in batches:
            for event in batch:
                if isinstance(event, Started):
                    return event.prompt_tokens
    raise ModelError("the language model ended an answer without beginning it")
