"""`GET /openapi.json`: the endpoints, their bodies described by the very schemas that check them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.access import OPEN_PATHS
from gateway.completions_schema import CompletionRequest, DetokenizeBody, TokenizeBody
from gateway.messages_schema import CountTokensRequest, MessagesRequest
from gateway.responses_schema import ResponsesRequest
from gateway.schema import ChatCompletionRequest
from gateway.strict_model import StrictModel
from gateway.version import version

_KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class _Post:
    path: str
    summary: str
    body: type[StrictModel]
    streams: bool = False
    error: str = "Error"


_POSTS = (
    _Post("/v1/chat/completions", "Answer a conversation", ChatCompletionRequest, True),
    _Post("/v1/completions", "Go on with a prompt", CompletionRequest, True),
    _Post("/v1/responses", "Answer a conversation, as a response object", ResponsesRequest, True),
    _Post(
        "/v1/messages", "Answer a conversation, as Anthropic's API", MessagesRequest, True, "AnthropicError"
    ),
    _Post("/v1/messages/count_tokens", "Count a prompt's tokens", CountTokensRequest, error="AnthropicError"),
    _Post("/tokenize", "Token ids of a text or a conversation", TokenizeBody),
    _Post("/detokenize", "Text of token ids", DetokenizeBody),
)
_GETS = {
    "/v1/models": "List what is served",
    "/health": "Whether this process lives",
    "/ready": "Whether a language model and an encoder answer",
    "/version": "The version of this server",
}


class OpenApi:
    """The route.  One object per application; the document is made once."""

    def __init__(self, has_keys: bool = False) -> None:
        self._document = openapi_document(has_keys)

    async def document(self, _request: Request) -> Response:
        return JSONResponse(self._document)


def openapi_document(has_keys: bool = False) -> dict[str, Any]:
    """`has_keys`: callers need one, but on `OPEN_PATHS`."""
    bodies = [(post.body, "validation") for post in _POSTS]
    _, schemas = models_json_schema(bodies, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, Any] = {post.path: {"post": _post(post)} for post in _POSTS}
    paths |= {path: {"get": _operation(path, summary)} for path, summary in _GETS.items()}
    paths["/v1/models/{model}"] = {"get": _model_operation()}
    paths["/metrics"] = {"get": _operation("/metrics", "Prometheus page", "text/plain")}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Tessera", "version": version()},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], **_error_schemas()}},
    }
    if has_keys:
        document["security"] = [{"bearer": []}, {"header": []}]
        document["components"]["securitySchemes"] = _KEY_SCHEMES
        for path in OPEN_PATHS:
            paths[path]["get"]["security"] = []
    return document


def _post(post: _Post) -> dict[str, Any]:
    body = {"$ref": _REF.format(model=post.body.__name__)}
    operation = _operation(post.path, post.summary, error=post.error)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if post.streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return operation


def _model_operation() -> dict[str, Any]:
    operation = _operation("/v1/models/model", "Describe one model")
    operation["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    return operation


def _operation(
    path: str, summary: str, media_type: str = "application/json", error: str = "Error"
) -> dict[str, Any]:
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    failure = {"application/json": {"schema": {"$ref": _REF.format(model=error)}}}
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "responses": {
            "200": {"description": "The answer", "content": {media_type: {"schema": schema}}},
            "default": {"description": "An error", "content": failure},
        },
    }


def _error_schemas() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    ours = {"message": text, "type": text, "param": maybe, "code": maybe}
    theirs = {"type": text, "message": text}
    return {
        "Error": _object({"error": _object(ours)}),
        "AnthropicError": _object({"type": {"const": "error"}, "error": _object(theirs), "request_id": text}),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
