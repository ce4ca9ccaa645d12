"""One computation of a tile for all streams that want it at a time: single flight, in front of the cache.

Knows nothing about pictures and decoding: whoever leads a tile brings its pixels.  For the event loop's
thread only.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from encoder_service.batcher import EncodedTile, OrderKey, TileBatcher
from encoder_service.tile_cache import TileCache, TileKey
from protos.errors import ServingError


@dataclass(eq=False)
class Claim:
    """One stream's wish for one tile; `result` fails or is there in the end, whatever becomes of others'."""

    key: TileKey
    order: OrderKey
    on_lead: Callable[[Claim], None]  # "bring the pixels": `submit` or `fail` must follow, unless it leaves
    result: asyncio.Future[EncodedTile]
    flight: _Flight | None = None

    @property
    def leads(self) -> bool:
        """Whether its stream is to bring the pixels."""
        return self.flight is not None and self.flight.leader is self

    @property
    def may_lead(self) -> bool:
        """Whether `on_lead` may still be called."""
        flight = self.flight
        return flight is not None and flight.forward is None and flight.leader is not self


@dataclass(eq=False)
class _Flight:
    """A tile on its way. Exactly one is at it: the leader, a forward, or a copy from the cache."""

    claims: list[Claim] = field(default_factory=list)  # oldest first
    leader: Claim | None = None
    forward: asyncio.Future[EncodedTile] | None = None
    copying: asyncio.Future[torch.Tensor] | None = None


class TileFlights:
    """The first claim of a tile that is not cached leads it; claims that come meanwhile wait for its result.

    A leader that leaves or fails before it has brought the pixels is followed by the oldest claim that waits:
    the content hash says that its picture is the same. Failures of the forward reach all.
    """

    def __init__(self, batcher: TileBatcher, cache: TileCache) -> None:
        self._batcher = batcher
        self._cache = cache
        self._flights: dict[TileKey, _Flight] = {}
        self.num_joins = 0  # claims that found their tile on its way

    def claim(self, key: TileKey, order: OrderKey, on_lead: Callable[[Claim], None]) -> Claim:
        """Want a tile; `on_lead` is called before this returns where nobody else is at it.

        Args:
            order: Of a forward's tiles, smaller first; a tile has the smallest of its claims.
        """
        claim = Claim(key, order, on_lead, asyncio.get_running_loop().create_future())
        flight = self._flights.get(key)
        if flight is not None:
            self._join(flight, claim)
        elif (found := self._cache.find(key)) is None:
            self._depart(claim)
            self._lead(claim)
        elif found.done():
            claim.result.set_result(_from_cache(found.result()))
        else:
            self._depart(claim).copying = found
            found.add_done_callback(partial(self._copied, key))
        return claim

    def submit(self, claim: Claim, pixels: torch.Tensor) -> None:
        """Hand in what the leader was asked for: the tile's uint8 [3, S, S]."""
        flight = claim.flight
        assert flight is not None and claim.leads
        flight.leader = None
        try:
            flight.forward = self._batcher.submit(pixels, min(other.order for other in flight.claims))
        except ServingError as error:
            self._land(claim.key, flight, error)
        else:
            flight.forward.add_done_callback(partial(self._encoded, claim.key, flight))

    def fail(self, claim: Claim, error: Exception) -> None:
        """The claim's own picture is at fault: others find out about theirs themselves."""
        self._leave(claim)
        if not claim.result.done():
            claim.result.set_exception(error)

    def leave(self, claim: Claim) -> None:
        """Nobody waits for the claim's result any more."""
        self._leave(claim)
        if not claim.result.cancel() and not claim.result.cancelled():
            claim.result.exception()  # retrieved: nobody is left to hear of it

    def _depart(self, claim: Claim) -> _Flight:
        claim.flight = self._flights[claim.key] = _Flight([claim])
        return claim.flight

    def _join(self, flight: _Flight, claim: Claim) -> None:
        self.num_joins += 1
        claim.flight = flight
        flight.claims.append(claim)
        if flight.forward is not None:
            self._batcher.hasten(flight.forward, claim.order)

    def _lead(self, claim: Claim) -> None:
        assert claim.flight is not None
        claim.flight.leader = claim
        claim.on_lead(claim)

    def _leave(self, claim: Claim) -> None:
        flight, claim.flight = claim.flight, None
        if flight is None:
            return
        flight.claims.remove(claim)
        if flight.claims:
            if flight.leader is claim:
                self._lead(flight.claims[0])
            return
        del self._flights[claim.key]
        for work in (flight.forward, flight.copying):
            if work is not None:
                work.cancel()

    def _encoded(self, key: TileKey, flight: _Flight, forward: asyncio.Future[EncodedTile]) -> None:
        if forward.cancelled():
            return
        error = forward.exception()
        if error is None:
            self._cache.put(key, forward.result())
        if self._flights.get(key) is not flight:  # all have left since it ended
            return
        # Results wait to be sent: they must not hold the device's memory meanwhile.
        self._land(key, flight, error or replace(forward.result(), on_device=None))

    def _copied(self, key: TileKey, copying: asyncio.Future[torch.Tensor]) -> None:
        flight = self._flights.get(key)
        if flight is None or flight.copying is not copying:  # all have left
            return
        flight.copying = None
        if copying.cancelled() or copying.exception() is not None:
            self._lead(flight.claims[0])
        else:
            self._land(key, flight, _from_cache(copying.result()))

    def _land(self, key: TileKey, flight: _Flight, outcome: EncodedTile | BaseException) -> None:
        del self._flights[key]
        for claim in flight.claims:
            claim.flight = None
            if isinstance(outcome, EncodedTile):
                claim.result.set_result(outcome)
            else:  # of its own: a traceback would tie the streams together
                claim.result.set_exception(copy.copy(outcome))


def _from_cache(embeds: torch.Tensor) -> EncodedTile:
    return EncodedTile(embeds, queue_ns=0, encode_ns=0, transfer_ns=0)
