"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes.  No special tokens are added to a text."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.access import charge_tokens
from gateway.completions_schema import DetokenizeBody, TokenizeBody
from gateway.conversation import MediaLimits, Turn, read_conversation
from gateway.errors import RequestError
from gateway.generation import Generator
from gateway.llm_client import LLMClient
from protos.errors import ServingError

_NO_MEDIA = MediaLimits(max_images=0, max_bytes=0, max_tiles=0)


class Tokens:
    """The routes.  One object per application."""

    def __init__(self, generator: Generator, client: LLMClient) -> None:
        self._generator = generator
        self._client = client

    async def tokenize(self, request: Request) -> Response:
        body = await self._generator.read(request, TokenizeBody)
        model = await self._generator.model(body.model)
        text = await _input(body)
        try:
            tokens = await self._client.tokenize(text)
        except ServingError as error:
            error.field = "messages" if body.prompt is None else "prompt"
            raise
        charge_tokens(request.state, len(tokens))
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": model.max_model_len,
                "tokens": tokens,
                "token_strs": None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._generator.read(request, DetokenizeBody)
        await self._generator.model(body.model)
        try:
            text = await self._client.detokenize(body.tokens)
        except ServingError as error:
            error.field = "tokens"
            raise
        charge_tokens(request.state, len(body.tokens))
        return JSONResponse({"prompt": text})


async def _input(body: TokenizeBody) -> str | Sequence[Turn]:
    if body.prompt is not None:
        return body.prompt
    try:
        return await read_conversation(body.messages or (), _NO_MEDIA)
    except RequestError as error:
        if error.error_code != "too_many_images":
            raise
        message = "Conversations with pictures cannot be tokenized; /v1/messages/count_tokens counts them."
        raise RequestError(message, code="unsupported_content_part", param="messages") from None
