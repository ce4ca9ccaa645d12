"""What one key may use: requests and tokens a minute, requests at a time.  Knows nothing about HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.access_config import AccessConfig
from gateway.errors import RateLimited
from gateway.events import Delta, Event, Started

Clock = Callable[[], float]
# For a slot there is no time to tell.
CONCURRENCY_RETRY_S = 1.0


@dataclass(frozen=True)
class Allowance:
    """What is left of a minute's worth."""

    name: str  # "requests" or "tokens"
    limit: int
    remaining: int
    reset_s: float  # until all of it is there again


class Bucket:
    """Holds a minute's worth and is refilled evenly.  It may be overdrawn: then it has to fill up first."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._filled_s = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until it has so much; 0 when it has."""
        now = self._clock()
        gained = (now - self._filled_s) * self._per_minute / 60
        self._level, self._filled_s = min(self._per_minute, self._level + gained), now
        return max(0.0, (amount - self._level) * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        self._level -= amount

    def allowance(self, name: str) -> Allowance:
        reset_s = self.wait_s(self._per_minute)
        return Allowance(name, int(self._per_minute), max(0, int(self._level)), reset_s)


class Caller:
    """The use of one key."""

    def __init__(self, config: AccessConfig, share: int = 1, clock: Clock = time.monotonic) -> None:
        """`share`: of how many processes this is one; each has an equal part of the limits."""
        requests, tokens = config.key_requests_per_minute, config.key_tokens_per_minute
        self._requests = Bucket(max(requests / share, 1), clock) if requests else None
        self._tokens = Bucket(max(tokens / share, 1), clock) if tokens else None
        self._concurrency = max(config.key_concurrency // share, 1) if config.key_concurrency else 0
        self.num_running = 0

    def enter(self) -> None:
        """One more request; whoever calls this calls `leave`.

        Raises:
            RateLimited: a limit is reached; the request does not count.
        """
        if self._concurrency and self.num_running >= self._concurrency:
            raise RateLimited("requests at a time", CONCURRENCY_RETRY_S)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1)):
            raise RateLimited("tokens per minute", wait_s)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1):
                raise RateLimited("requests per minute", wait_s)
            self._requests.take(1)
        self.num_running += 1

    def leave(self) -> None:
        self.num_running -= 1

    def allowances(self) -> list[Allowance]:
        """Of each limit a minute, as far as this process knows."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return [bucket.allowance(name) for name, bucket in buckets.items() if bucket is not None]

    def charge(self, events: Sequence[Event]) -> None:
        """Tokens as they come: a client that leaves before the end has had them, too."""
        for event in events:
            if isinstance(event, Started):
                self.charge_tokens(event.prompt_tokens)
            elif isinstance(event, Delta):
                self.charge_tokens(event.num_tokens)

    def charge_tokens(self, num_tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(num_tokens)
