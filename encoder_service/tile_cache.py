"""Visual tokens of tiles that were encoded before: in device memory first, then on the host, both bounded.

Knows nothing about pictures, streams or who computes.  For the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from encoder_service.batcher import EncodedTile, detached

# Tiles on their way to the host tier; what is put aside faster than that is dropped.
MOST_MOVING = 64

log = logging.getLogger(__name__)

TileKey = tuple[bytes, bytes, int]  # (cache salt, content hash of the picture, index of the tile)


@dataclass(eq=False)
class _Entry:
    embeds: torch.Tensor  # [num_tokens, hidden_size]; never written again
    is_local: bool  # whether it can be handed out as it is; else it is on the device or page-locked


class CacheTier:
    """One memory's tiles, and what became of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.num_hits = 0
        self.num_evictions = 0
        self._entries: OrderedDict[TileKey, _Entry] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: TileKey) -> bool:
        return key in self._entries

    def hit(self, key: TileKey) -> _Entry | None:
        """The entry, now the most recently used one."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            self.num_hits += 1
        return entry

    def takes(self, num_bytes: int) -> bool:
        return num_bytes <= self.max_bytes

    def insert(self, key: TileKey, entry: _Entry) -> list[tuple[TileKey, _Entry]]:
        """Add an entry that the tier takes; returns those that had to go, least recently used first."""
        assert key not in self._entries and self.takes(entry.embeds.nbytes)
        self.used_bytes += entry.embeds.nbytes
        evicted = []
        while self.used_bytes > self.max_bytes:
            oldest, victim = self._entries.popitem(last=False)
            self.used_bytes -= victim.embeds.nbytes
            self.num_evictions += 1
            evicted.append((oldest, victim))
        self._entries[key] = entry
        return evicted

    def discard(self, key: TileKey, entry: _Entry) -> None:
        """Forget exactly this entry, if it is still there."""
        if self._entries.get(key) is entry:
            self.used_bytes -= self._entries.pop(key).embeds.nbytes


class TileCache:
    """Tensors go in once and are never written again: whoever was given one may keep it after its eviction.

    What the device tier evicts moves to the host tier, which keeps pageable copies: tiles leave it by the
    CPU, into a socket or a ring, and page-locked memory, about 1 ms a tile from the system, is for forwards.
    A hit on the host does not move back: it would cross the bus twice to be sent from the host.
    """

    def __init__(
        self,
        host_bytes: int,
        device_bytes: int = 0,
        to_host: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            host_bytes, device_bytes: Bounds of the tiers; 0 switches a tier off.
            to_host: Copies a finished tile from the device, and returns one that is on the host as it is;
                called on a thread. None: there is no device, and results need no copy to be kept.
        """
        self.device = CacheTier(device_bytes)
        self.host = CacheTier(host_bytes)
        self.num_misses = 0
        self._to_host = to_host
        self._copier = ThreadPoolExecutor(1, "tile-copies")
        self._num_moving = 0
        self._is_closed = False

    def find(self, key: TileKey) -> asyncio.Future[torch.Tensor] | None:
        """The tile's [num_tokens, hidden_size] on the host, there at once unless it comes from the device.

        None if it is not cached. The future fails when the copy does; the tile is then cached no more.
        """
        if not self._is_closed:
            for tier in (self.device, self.host):
                entry = tier.hit(key)
                if entry is not None:
                    return self._read(key, entry, tier)
        self.num_misses += 1
        return None

    def put(self, key: TileKey, tile: EncodedTile) -> None:
        """Keep a tile that a forward has made, where there is room for it."""
        if self._is_closed or key in self.device or key in self.host:
            return
        if tile.on_device is None or not self.device.takes(tile.on_device.nbytes):
            self._put_on_host(key, tile.embeds)
            return
        for evicted, entry in self.device.insert(key, _Entry(tile.on_device, is_local=False)):
            self._put_on_host(evicted, entry.embeds)

    def close(self) -> None:
        """Nothing is found or kept any more; blocks until a copy that has begun has ended."""
        self._is_closed = True
        self._copier.shutdown(cancel_futures=True)

    def _read(self, key: TileKey, entry: _Entry, tier: CacheTier) -> asyncio.Future[torch.Tensor]:
        loop = asyncio.get_running_loop()
        if entry.is_local:
            ready: asyncio.Future[torch.Tensor] = loop.create_future()
            ready.set_result(entry.embeds)
            return ready
        assert self._to_host is not None
        copy = loop.run_in_executor(self._copier, self._to_host, entry.embeds)
        copy.add_done_callback(partial(self._read_ended, key, entry, tier))
        return copy

    def _read_ended(
        self, key: TileKey, entry: _Entry, tier: CacheTier, copy: asyncio.Future[torch.Tensor]
    ) -> None:
        if not copy.cancelled() and _has_failed(copy):
            tier.discard(key, entry)

    def _put_on_host(self, key: TileKey, embeds: torch.Tensor) -> None:
        has_way = self._to_host is None or self._num_moving < MOST_MOVING
        if not (has_way and self.host.takes(embeds.nbytes)):
            return
        entry = _Entry(embeds, is_local=self._to_host is None)
        self.host.insert(key, entry)
        if self._to_host is not None:
            self._num_moving += 1
            move = partial(_pageable, self._to_host, embeds)
            moving = asyncio.get_running_loop().run_in_executor(self._copier, move)
            moving.add_done_callback(partial(self._move_ended, key, entry))

    def _move_ended(self, key: TileKey, entry: _Entry, moving: asyncio.Future[torch.Tensor]) -> None:
        self._num_moving -= 1
        if moving.cancelled() or _has_failed(moving):
            self.host.discard(key, entry)
        else:
            entry.embeds, entry.is_local = moving.result(), True


def _pageable(to_host: Callable[[torch.Tensor], torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
    return detached(to_host(embeds))


def _has_failed(copy: asyncio.Future[torch.Tensor]) -> bool:
    error = copy.exception()
    if error is not None:
        log.error("a cached tile could not be copied to the host", exc_info=error)
    return error is not None
