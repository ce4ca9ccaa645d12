"""The door: who calls is known, and within limits, before anything of a request is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders, State
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access_config import AccessConfig
from gateway.api_keys import ApiKey, KeyRing, load_keys
from gateway.config import GatewayConfig
from gateway.errors import RateLimited, Unauthorized, error_response
from gateway.events import Event
from gateway.key_limits import Caller
from protos.request_context import REQUEST_ID_KEY

# What orchestrators ask, without a secret.  All else tells what runs here, the version and the API included.
OPEN_PATHS = frozenset({"/health", "/ready"})
# The page's files are the same everywhere; what the page asks for needs the key that its user types in.
PAGE_FILES = "/page/"
CORS_MAX_AGE_S = 600
# OpenAI's names: https://platform.openai.com/docs/guides/rate-limits
_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{field}-{name}"
    for name in ("requests", "tokens")
    for field in ("limit", "remaining", "reset")
)
_READABLE_HEADERS = (REQUEST_ID_KEY, "retry-after", "x-should-retry", *_LIMIT_HEADERS)

log = logging.getLogger(__name__)


def open_key_ring(config: GatewayConfig) -> KeyRing:
    """The keys of the settings.

    Raises:
        OSError, ValueError: they cannot be read; or there are none and others can reach the address.
    """
    keys = load_keys(config.access.api_keys_file, config.access.api_key_hashes)
    if not keys and not config.access.allow_no_keys and not _is_loopback(config.host):
        raise ValueError(
            f"host {config.host} can be reached by others: give API keys (api_keys_file, api_key_hashes) "
            "or say allow_no_keys"
        )
    return keys


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def access_middleware(config: GatewayConfig, keys: KeyRing) -> list[Middleware]:
    """CORS outside: a preflight has no key, and pages must be able to read a refusal."""
    layers = []
    if config.access.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.access.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=list(_READABLE_HEADERS),
                max_age=CORS_MAX_AGE_S,
            )
        )
    if keys:
        layers.append(
            Middleware(AccessMiddleware, config=config.access, keys=keys, share=config.gateway_workers)
        )
    return layers


class AccessMiddleware:
    """Every path but the open ones needs a key.  Plain ASGI, so that disconnects pass through."""

    def __init__(self, app: ASGIApp, config: AccessConfig, keys: KeyRing, share: int = 1) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._share = share
        self._callers: dict[str, Caller] = {}  # by the key's name, so no more than there are keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = self._find(Headers(scope=scope))
        if key is None:
            await error_response(Unauthorized(), scope)(scope, receive, send)
            return
        caller = self._callers.setdefault(key.name, Caller(self._config, self._share))
        send = _telling_limits(caller, send)
        try:
            caller.enter()
        except RateLimited as error:
            log.info("key %s: %s", key.name, error.message)
            await error_response(error, scope)(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)
        finally:
            caller.leave()

    def _find(self, headers: Headers) -> ApiKey | None:
        """As OpenAI's clients send it or as Anthropic's do; of two, one that is known suffices."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        found = [self._keys.find(presented) for presented in (bearer, headers.get("x-api-key", ""))]
        return found[0] or found[1]


def _telling_limits(caller: Caller, send: Send) -> Send:
    """Answers say what is left of the key's limits; those without any are left as they are."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for allowance in caller.allowances():
                headers[f"x-ratelimit-limit-{allowance.name}"] = str(allowance.limit)
                headers[f"x-ratelimit-remaining-{allowance.name}"] = str(allowance.remaining)
                headers[f"x-ratelimit-reset-{allowance.name}"] = duration(allowance.reset_s)
        await send(message)

    return send_with_limits if caller.allowances() else send


def duration(seconds: float) -> str:
    """As OpenAI writes it, never too short: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path == "/" or path.startswith(PAGE_FILES)


def charge(state: State, events: Sequence[Event]) -> None:
    """Count the tokens of these events to the key of the request, if it needed one."""
    if (caller := _caller(state)) is not None:
        caller.charge(events)


def charge_tokens(state: State, num_tokens: int) -> None:
    """The same for tokens that were counted and not generated from."""
    if (caller := _caller(state)) is not None:
        caller.charge_tokens(num_tokens)


def _caller(state: State) -> Caller | None:
    caller: Caller | None = getattr(state, "caller", None)
    return caller
