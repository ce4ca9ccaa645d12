"""Media by URL: each hop is parsed, allowed, resolved once, checked, and connected to at the checked address.

Knows nothing about file formats.  Clients hear the same of all that fails on the way, whatever it was: they
must not learn from it what is reachable from here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address

from encoder_service.fetch_limits import FetchLimits
from encoder_service.http_get import FetchFailed, Response, TooLarge, get
from encoder_service.media_url import BadUrl, MediaUrl, parse_media_url
from encoder_service.public_address import Address, is_public
from protos.errors import InvalidRequest, Overloaded

NOT_FETCHED = "the URL could not be fetched"
# Of a host; more would only make a dead one take longer.
MAX_ADDRESSES = 4
RETRY_AFTER_S = 1.0

log = logging.getLogger(__name__)

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# Name to addresses; raises OSError.
Resolve = Callable[[str], Awaitable[Sequence[str]]]
# To that address and port and no other; the last is the name that the certificate must have, None for http.
Connect = Callable[[Address, int, str | None], Awaitable[Connection]]


class FetchBudget:
    """What the fetches of one stream may take together: bytes in all, and places at a time."""

    def __init__(self, num_bytes: int, num_places: int = 1) -> None:
        self.left = num_bytes
        self.places = asyncio.Semaphore(num_places)


class _Allowance:
    """The bytes of one medium, charged to its stream's budget as they come."""

    def __init__(self, max_bytes: int, budget: FetchBudget) -> None:
        self._left = max_bytes
        self._budget = budget

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        self._budget.left -= num_bytes
        if self._left < 0 or self._budget.left < 0:
            raise TooLarge


async def open_connection(
    address: Address, port: int, tls_name: str | None, tls: ssl.SSLContext | None
) -> Connection:
    """Raises OSError, also for a certificate that is not the name's."""
    context = None if tls_name is None else tls
    return await asyncio.open_connection(str(address), port, ssl=context, server_hostname=tls_name)


class MediaFetcher:
    def __init__(
        self, limits: FetchLimits, resolve: Resolve | None = None, connect: Connect | None = None
    ) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.max_fetches, thread_name_prefix="resolve")
        self._tls = ssl.create_default_context() if limits.media_hosts else None
        self._resolve = resolve or self._look_up
        self._connect = connect or self._open
        self._places = asyncio.Semaphore(limits.max_fetches)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def budget(self, num_bytes: int) -> FetchBudget:
        """Of one stream: at most half of all places, or a request of slow URLs would shut out all others."""
        return FetchBudget(num_bytes, max(self._limits.max_fetches // 2, 1))

    async def fetch(self, text: str, max_bytes: int, budget: FetchBudget, field: str) -> bytes:
        """What the URL names, of at most `max_bytes` and what is left of `budget`.

        Raises:
            InvalidRequest: the URL is malformed, not allowed or too large, or could not be fetched.
            Overloaded: others take all places.
        """
        url = self._allowed(text, field)
        async with self._place(budget):
            try:
                async with asyncio.timeout(self._limits.fetch_timeout_s):
                    return await self._follow(url, _Allowance(max_bytes, budget))
            except TooLarge:
                message = (
                    f"the URL's file has more than {max_bytes} bytes, or than the request's media may have"
                )
                raise InvalidRequest(message, field=field) from None
            except (FetchFailed, BadUrl, TimeoutError) as error:
                log.info("%s: not fetched from %s: %s", field, url.host, error or type(error).__name__)
                raise InvalidRequest(NOT_FETCHED, field=field) from None

    def _allowed(self, text: str, field: str) -> MediaUrl:
        """What a client may be told: it follows from the URL's text and the settings alone."""
        if not self._limits.media_hosts:
            raise InvalidRequest("fetching URLs is not enabled on this server", field=field)
        try:
            url = parse_media_url(text)
        except BadUrl as error:
            raise InvalidRequest(str(error), field=field) from None
        if problem := self._problem(url):
            raise InvalidRequest(problem, field=field)
        return url

    def _problem(self, url: MediaUrl) -> str | None:
        if url.scheme != "https" and not self._limits.media_http:
            return "only https URLs are fetched by this server"
        return None if self._limits.allows(url.host) else "this server fetches nothing from the URL's host"

    @asynccontextmanager
    async def _place(self, budget: FetchBudget) -> AsyncIterator[None]:
        async with AsyncExitStack() as places:
            try:
                async with asyncio.timeout(self._limits.fetch_timeout_s):
                    await places.enter_async_context(budget.places)
                    await places.enter_async_context(self._places)
            except TimeoutError:
                message = "too many media are being fetched already"
                raise Overloaded(message, retry_after_s=RETRY_AFTER_S) from None
            yield

    async def _follow(self, url: MediaUrl, allowance: _Allowance) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            response = await self._get(url, allowance)
            if response.location is None:
                return response.body
            url = url.redirected(response.location)
            if problem := self._problem(url):
                raise FetchFailed(f"redirected to {url.host}: {problem}")
        raise FetchFailed("too many redirects")

    async def _get(self, url: MediaUrl, allowance: _Allowance) -> Response:
        addresses = await self._addresses(url)
        reader, writer = await self._connected(url, addresses)
        try:
            return await get(reader, writer, url.authority, url.target, allowance)
        finally:
            writer.transport.abort()  # a close would wait for what the other side does

    async def _addresses(self, url: MediaUrl) -> list[Address]:
        """All that the name has now; one that is not public is enough to refuse it."""
        if url.address is not None:
            addresses = [url.address]
        else:
            try:
                addresses = [ip_address(address) for address in await self._resolve(url.host)]
            except (OSError, ValueError) as error:
                raise FetchFailed(f"{url.host} has no address: {error}") from None
        blocked = [str(address) for address in addresses if not is_public(address)]
        if blocked or not addresses:
            raise FetchFailed(f"{url.host} is at {', '.join(blocked) or 'no address'}")
        return addresses[:MAX_ADDRESSES]

    async def _connected(self, url: MediaUrl, addresses: Sequence[Address]) -> Connection:
        name = url.host if url.scheme == "https" else None
        failure = ""
        for address in addresses:
            try:
                async with asyncio.timeout(self._limits.fetch_connect_timeout_s):
                    return await self._connect(address, url.port, name)
            except (OSError, TimeoutError) as error:  # ssl's errors, too
                failure = f"{address}: {error or type(error).__name__}"
        raise FetchFailed(f"no connection: {failure}")

    async def _look_up(self, host: str) -> Sequence[str]:
        """In threads of its own: a name server that does not answer must not hold up anything else."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def _open(self, address: Address, port: int, tls_name: str | None) -> Connection:
        return await open_connection(address, port, tls_name, self._tls)
