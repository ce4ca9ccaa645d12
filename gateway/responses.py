"""`POST /v1/responses`, stateless: a chat request in other words, answered as a response object."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.answer_stream import answer_stream
from gateway.disconnect import until_disconnect
from gateway.generation import Generator, collect
from gateway.response_object import ResponseEncoder, ResponseObject
from gateway.responses_schema import ResponsesRequest, adapt_response
from gateway.streaming import EventStreamResponse


class Responses:
    """The route.  One object per application."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def create(self, request: Request) -> Response:
        timer = self._generator.timer()
        body = await self._generator.read(request, ResponsesRequest)
        model = await self._generator.model(body.model)
        chat, adaptation = adapt_response(body)
        with adaptation.reworded():
            turns = await self._generator.turns(chat, model)
            answer = self._generator.answer_chat(request, chat, turns, model, timer)
        events = adaptation.events(answer)
        response = ResponseObject(body, request.state.request_id, int(time.time()), model.id)
        if body.stream:
            return EventStreamResponse(answer_stream(events, ResponseEncoder(response)))
        whole = await until_disconnect(request.receive, collect(events, response))
        return JSONResponse(whole.body())
