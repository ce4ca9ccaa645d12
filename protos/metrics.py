"""Prometheus series of gRPC calls, and the page that serves a process's series."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from prometheus_client import Counter, Gauge, Histogram, start_http_server

log = logging.getLogger(__name__)

CALLS_STARTED = Counter("tessera_grpc_started_total", "Calls received", ["method"])
CALLS_HANDLED = Counter("tessera_grpc_handled_total", "Calls ended", ["method", "code"])
CALLS_IN_FLIGHT = Gauge("tessera_grpc_in_flight", "Calls in progress", ["method"])
CALL_SECONDS = Histogram(
    "tessera_grpc_seconds",
    "Duration of calls",
    ["method"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
Handler = Callable[[Any, Any], Any]


def start_metrics_server(host: str, port: int) -> int:
    """Serve `/metrics` from a daemon thread; returns the port."""
    server, _ = start_http_server(port, addr=host)
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    return int(server.server_port)


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts and times every call.  Handlers must be coroutines or async generators."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
            wrapped: Handler = _observe_stream(method, getattr(handler, kind))
        else:
            kind = "stream_unary" if handler.request_streaming else "unary_unary"
            wrapped = _observe_unary(method, getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


class _Observation:
    def __init__(self, method: str) -> None:
        self._method = method
        self._start = time.perf_counter()
        self.finished = False
        CALLS_STARTED.labels(method).inc()
        CALLS_IN_FLIGHT.labels(method).inc()

    def end(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        # abort() raises a bare exception, so the context's code tells more than the exception's type.
        code: Any = context.code()
        code = code or (grpc.StatusCode.OK if self.finished else grpc.StatusCode.CANCELLED)
        name = code.name if isinstance(code, grpc.StatusCode) else _name_of(code)
        CALLS_IN_FLIGHT.labels(self._method).dec()
        CALLS_HANDLED.labels(self._method, name).inc()
        CALL_SECONDS.labels(self._method).observe(time.perf_counter() - self._start)


def _name_of(number: int) -> str:
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), "UNKNOWN")


def _observe_stream(method: str, behaviour: Handler) -> Handler:
    async def observed(request: Any, context: Any) -> AsyncIterator[Any]:
        observation = _Observation(method)
        responses = behaviour(request, context)
        try:
            async for response in responses:
                yield response
            observation.finished = True
        finally:
            # grpc.aio never closes abandoned generators itself; cleanup must not wait for the collector.
            try:
                await responses.aclose()
            finally:
                observation.end(context)

    return observed


def _observe_unary(method: str, behaviour: Handler) -> Handler:
    async def observed(request: Any, context: Any) -> Any:
        observation = _Observation(method)
        try:
            response = await behaviour(request, context)
            observation.finished = True
            return response
        finally:
            observation.end(context)

    return observed
