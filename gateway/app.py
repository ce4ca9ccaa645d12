"""The application and its server: routes, error handlers, a socket, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from gateway.chat import ChatCompletions
from gateway.config import GatewayConfig
from gateway.errors import on_http_exception, on_serving_error
from gateway.llm_client import LLMClient
from gateway.metrics import GatewayMetrics
from gateway.middleware import RequestMiddleware
from gateway.models import Models
from gateway.page import Page
from gateway.probes import Probes
from gateway.worker_pages import WorkerPages
from gateway.workers import bind, serve_workers
from protos.errors import ServingError

BACKLOG = 2048
STARTUP_POLL_S = 0.01

log = logging.getLogger(__name__)


def create_app(
    config: GatewayConfig,
    client: LLMClient,
    metrics: GatewayMetrics | None = None,
    pages: WorkerPages | None = None,
) -> Starlette:
    metrics = metrics or GatewayMetrics()
    chat, models = ChatCompletions(config, client, metrics), Models(client)
    probes, page = Probes(client, metrics, pages), Page()
    app = Starlette(
        routes=[
            Route("/", page.index),
            Route("/page/{name}", page.asset),
            Route("/v1/chat/completions", chat.create, methods=["POST"]),
            Route("/v1/models", models.list),
            Route("/v1/models/{model:path}", models.retrieve),
            Route("/health", probes.health),
            Route("/ready", probes.ready),
            Route("/metrics", probes.metrics),
        ],
        middleware=[Middleware(RequestMiddleware, metrics=metrics)],
        exception_handlers={
            ServingError: on_serving_error,
            HTTPException: on_http_exception,
        },
    )
    # A redirected POST loses its body.
    app.router.redirect_slashes = False
    return app


class GatewayServer(uvicorn.Server):
    """uvicorn that returns after a signal; its own way is to raise the signal again once it has drained."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_server(app: Starlette, config: GatewayConfig) -> GatewayServer:
    return GatewayServer(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=round(config.shutdown_grace_s),
        )
    )


async def serve(config: GatewayConfig, on_ready: Callable[[int], None]) -> None:
    """Listen, call `on_ready` with the port, run until SIGTERM or SIGINT, let running requests finish.

    Raises:
        OSError: the address is taken or not ours.
        Unavailable: one of several workers ended.
    """
    if config.gateway_workers > 1:
        await serve_workers(config, on_ready)
    else:
        await serve_on(bind(config.host, config.port), config, on_ready)


async def serve_on(
    listener: socket.socket,
    config: GatewayConfig,
    on_ready: Callable[[int], None],
    pages: WorkerPages | None = None,
) -> None:
    """As `serve`, in this process, on a bound socket; `pages` where others listen to the same port."""
    client = LLMClient(config.llm, config.llm_tls, model_timeout_s=config.model_timeout_s)
    client.start()
    metrics = GatewayMetrics()
    if pages is not None:
        await pages.listen(metrics.page)
    server = make_server(create_app(config, client, metrics, pages), config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(STARTUP_POLL_S)
        if server.started:
            log.info("listening on %s:%d", *listener.getsockname()[:2])
            on_ready(listener.getsockname()[1])
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()
        if pages is not None:
            pages.close()
        await client.close()
