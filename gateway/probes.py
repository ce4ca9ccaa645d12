"""`/health`, `/ready` and `/metrics`: what orchestrators and operators look at."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.llm_client import LLMClient
from gateway.metrics import CONTENT_TYPE, GatewayMetrics
from gateway.model_info import ModelInfo
from gateway.version import version
from gateway.worker_pages import WorkerPages


class Probes:
    """The routes.  One object per application."""

    def __init__(self, client: LLMClient, metrics: GatewayMetrics, pages: WorkerPages | None = None) -> None:
        """`pages`: those of all processes that share the port."""
        self._client = client
        self._metrics = metrics
        self._pages = pages

    async def health(self, _request: Request) -> Response:
        """This process lives; says nothing about the others."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """200 when a language model answers and it has an encoder; else 503 naming what is missing."""
        models = [answer for answer in await self._client.models() if isinstance(answer, ModelInfo)]
        has_encoder = any(model.encoders_ready for model in models)
        parts = {"language_model": bool(models), "encoder": has_encoder}
        missing = [name for name, there in parts.items() if not there]
        if missing:
            return JSONResponse({"status": "not_ready", "missing": missing}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ready", "model": models[0].id})

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": version()})

    async def metrics(self, _request: Request) -> Response:
        page = await self._pages.page() if self._pages is not None else self._metrics.page()
        return Response(page, media_type=CONTENT_TYPE)
