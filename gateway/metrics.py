"""Prometheus series of the gateway.  One object per application, so that several can live in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from gateway.events import Delta, Event, Restarted, Usage

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class GatewayMetrics:
    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "tessera_gateway_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("tessera_gateway_in_flight", "Requests in progress", registry=registry)
        self.disconnects = Counter(
            "tessera_gateway_disconnects", "Requests whose client went away", registry=registry
        )
        self.restarts = Counter(
            "tessera_gateway_restarts",
            "Requests sent to another language model because one was lost or full",
            registry=registry,
        )
        self.ignored_keys = Counter(
            "tessera_gateway_ignored_keys", "Unknown top-level keys of requests", registry=registry
        )
        self.tokens = Counter(
            "tessera_gateway_tokens", "Tokens of finished answers", ["kind"], registry=registry
        )
        self.first_token_s = Histogram(
            "tessera_gateway_time_to_first_token_seconds",
            "Request received to first text",
            registry=registry,
            buckets=_FIRST_TOKEN_S,
        )
        self.inter_token_s = Histogram(
            "tessera_gateway_inter_token_seconds",
            "Time between two deltas of one choice, per token of the later",
            registry=registry,
            buckets=_INTER_TOKEN_S,
        )

    def page(self) -> bytes:
        return generate_latest(self._registry)


class AnswerTimer:
    """Observes the events of one answer."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}  # choice -> time of its last delta

    def observe(self, batch: Sequence[Event]) -> None:
        """Events that have come together."""
        now = time.perf_counter()
        for event in batch:
            if isinstance(event, Delta):
                self._observe_delta(event, now)
            elif isinstance(event, Usage):
                self._count(event)
            elif isinstance(event, Restarted):
                self._metrics.restarts.inc()

    def _count(self, usage: Usage) -> None:
        counts = {
            "prompt": usage.prompt_tokens,
            "image": usage.image_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
        }
        for kind, count in counts.items():
            self._metrics.tokens.labels(kind).inc(count)

    def _observe_delta(self, delta: Delta, now: float) -> None:
        last = self._last.get(delta.index)
        if last is not None:
            self._metrics.inter_token_s.observe((now - last) / max(delta.num_tokens, 1))
        elif not self._last:
            self._metrics.first_token_s.observe(now - self._start)
        self._last[delta.index] = now
