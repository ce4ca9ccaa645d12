"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.errors import ModelNotFound
from gateway.llm_client import LLMClient
from gateway.model_info import ModelInfo


class Models:
    """The routes.  One object per application."""

    def __init__(self, client: LLMClient) -> None:
        self._client = client
        self._created = int(time.time())

    async def list(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._json(await self._client.model())]})

    async def retrieve(self, request: Request) -> Response:
        """Ids may hold slashes, raw or percent-encoded: the path arrives decoded."""
        model = await self._client.model()
        if request.path_params["model"] != model.id:
            raise ModelNotFound(request.path_params["model"])
        return JSONResponse(self._json(model))

    def _json(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.id,
            "object": "model",
            "created": self._created,
            "owned_by": "tessera",
            "root": model.id,
            "parent": None,
            "max_model_len": model.max_model_len,
        }
