"""Sends the requests of a batch to a gateway, several at a time, and tries again what it had no room for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import httpx

from deploy.batch_file import BatchRequest, BatchResult
from deploy.completions import TIMEOUT

# Full, or starting again: nothing is wrong with the request.
RETRIED_STATUSES = frozenset({408, 429, 503})
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0

Pause = Callable[[float], Awaitable[None]]
Report = Callable[[BatchResult], None]


class GatewayLost(Exception):
    """Nobody answers any more: the batch stops, and what is missing can be asked for by another run."""


class BatchRunner:
    """`base_url` ends in /v1, as in the official client."""

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        max_attempts: int,
        api_key: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Pause = asyncio.sleep,
    ) -> None:
        """`max_attempts`: of one request, while the gateway is full or away."""
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._concurrency = concurrency
        self._max_attempts = max_attempts
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._transport = transport
        self._pause = pause

    async def run(self, requests: Iterator[BatchRequest], report: Report) -> None:
        """`report` gets each result when it is there.

        Raises:
            GatewayLost: after as many attempts as allowed.
        """
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(
            base_url=self._base_url,
            headers=self._headers,
            timeout=TIMEOUT,
            limits=limits,
            transport=self._transport,
        ) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(self._work(http, requests, report))
            except* Exception as errors:
                raise errors.exceptions[0] from None

    async def _work(self, http: httpx.AsyncClient, requests: Iterator[BatchRequest], report: Report) -> None:
        """All workers share the iterator: a request is read when somebody has time for it."""
        for request in requests:
            report(await self._ask(http, request))

    async def _ask(self, http: httpx.AsyncClient, request: BatchRequest) -> BatchResult:
        for attempt in range(1, self._max_attempts + 1):
            is_last = attempt == self._max_attempts
            pause_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), MAX_PAUSE_S)
            try:
                response = await http.post(request.url, json=request.body)
            except httpx.HTTPError as error:
                if is_last:
                    message = f"no answer from {self._base_url}: {error or type(error).__name__}"
                    raise GatewayLost(message) from error
            else:
                if is_last or not _may_change(response):
                    return _result(request.custom_id, response)
                pause_s = _retry_after_s(response) or pause_s
            await self._pause(pause_s)
        raise AssertionError("max_attempts is at least 1")


def _may_change(response: httpx.Response) -> bool:
    """By its status, unless the gateway says itself that the same would come again."""
    return (
        response.status_code in RETRIED_STATUSES
        and response.headers.get("x-should-retry", "").lower() != "false"
    )


def _retry_after_s(response: httpx.Response) -> float:
    """0 where the server does not say it in seconds."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MAX_PAUSE_S) if value.isdecimal() else 0.0


def _result(custom_id: str, response: httpx.Response) -> BatchResult:
    try:
        body = response.json()
    except ValueError:
        message = f"The server's answer is not JSON (HTTP {response.status_code})."
        return BatchResult(custom_id, error_code="invalid_response", error_message=message)
    request_id = response.headers.get("x-request-id", "")
    return BatchResult(custom_id, response.status_code, request_id, body)
