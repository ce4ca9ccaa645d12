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

from gateway.access import access_middleware, open_key_ring
from gateway.api_keys import KeyRing
from gateway.chat import ChatCompletions
from gateway.completions import Completions
from gateway.config import GatewayConfig
from gateway.errors import on_http_exception, on_serving_error
from gateway.generation import Generator
from gateway.llm_client import LLMClient
from gateway.messages import Messages
from gateway.metrics import GatewayMetrics
from gateway.middleware import RequestMiddleware
from gateway.models import Models
from gateway.openapi import OpenApi
from gateway.page import Page
from gateway.probes import Probes
from gateway.responses import Responses
from gateway.slow_clients import guarded
from gateway.tokens import Tokens
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
    keys: KeyRing | None = None,
) -> Starlette:
    metrics, keys = metrics or GatewayMetrics(), keys or KeyRing([])
    probes, openapi, page = Probes(client, metrics, pages), OpenApi(has_keys=bool(keys)), Page()
    app = Starlette(
        routes=[
            Route("/", page.index),
            Route("/page/{name}", page.asset),
            *_api_routes(config, client, Generator(config, client, metrics)),
            Route("/health", probes.health),
            Route("/ready", probes.ready),
            Route("/metrics", probes.metrics),
            Route("/version", probes.version),
            Route("/openapi.json", openapi.document),
        ],
        middleware=[
            Middleware(RequestMiddleware, metrics=metrics),
            *access_middleware(config, keys),
        ],
        exception_handlers={
            ServingError: on_serving_error,
            HTTPException: on_http_exception,
        },
    )
    # A redirected POST loses its body.
    app.router.redirect_slashes = False
    return app


def _api_routes(config: GatewayConfig, client: LLMClient, generator: Generator) -> list[Route]:
    chat = ChatCompletions(generator, also_reasoning=config.also_reasoning)
    completions, responses = Completions(generator, client), Responses(generator)
    messages, tokens, models = Messages(generator, client), Tokens(generator, client), Models(client)
    return [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        *(Route(f"{root}/tokenize", tokens.tokenize, methods=["POST"]) for root in ("", "/v1")),
        *(Route(f"{root}/detokenize", tokens.detokenize, methods=["POST"]) for root in ("", "/v1")),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.retrieve),
    ]


class GatewayServer(uvicorn.Server):
    """uvicorn that returns after a signal; its own way is to raise the signal again once it has drained."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_server(app: Starlette, config: GatewayConfig) -> GatewayServer:
    return GatewayServer(
        uvicorn.Config(
            app,
            http=guarded(config.header_timeout_s, config.write_timeout_s),
            ssl_certfile=config.tls_cert or None,
            ssl_keyfile=config.tls_key or None,
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
        OSError: the address is taken or not ours, or a file cannot be read.
        ValueError: API keys are malformed, or missing where others can reach the address.
        Unavailable: one of several workers ended.
    """
    open_key_ring(config)  # refused before anything is started
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
    keys = open_key_ring(config)
    client = LLMClient(config.llm, config.llm_tls, model_timeout_s=config.model_timeout_s)
    client.start()
    metrics = GatewayMetrics()
    if pages is not None:
        await pages.listen(metrics.page)
    server = make_server(create_app(config, client, metrics, pages, keys), config)
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
