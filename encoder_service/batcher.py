"""Tiles of concurrent requests, gathered into forwards on one worker thread; first tiles go first.

Knows nothing about pictures, models or transport: `encode` maps a batch of tiles to a batch of embeddings.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile

import torch

from protos.errors import ModelError, ServingError, Unavailable

log = logging.getLogger(__name__)

# What a tile is ordered by, smaller first: (priority of the request, index of the tile in its picture).
OrderKey = tuple[int, ...]


@dataclass(frozen=True)
class EncodedTile:
    embeds: torch.Tensor  # [num_tokens, hidden_size] on the host
    queue_ns: int  # waiting for a place in a forward
    encode_ns: int  # the forward that it shared


@dataclass(frozen=True, eq=False)
class _Waiting:
    arrival: int
    submitted_s: float
    order: OrderKey
    tile: torch.Tensor  # uint8 [3, S, S]
    future: asyncio.Future[EncodedTile]


class TileBatcher:
    """Queue in front of an encoder that runs one forward at a time.

    A free worker takes what waits, up to `max_batch_tiles`, and never waits for more. Every waiting picture's
    tile 0 is taken before anybody's tile 1, first come first served among equals; a tile that has waited
    `max_wait_s` goes before all of them, so a stream of new pictures starves nobody.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        max_batch_tiles: int,
        max_wait_s: float = 2.0,
    ) -> None:
        """`encode` maps uint8 [num_tiles, 3, S, S] to embeddings whose first dimension is num_tiles."""
        assert max_batch_tiles >= 1
        self._encode = encode
        self._max_batch_tiles = max_batch_tiles
        self._max_wait_s = max_wait_s
        self._arrivals = count()
        self._waiting: dict[int, _Waiting] = {}  # by arrival, oldest first
        self._changed = threading.Condition()
        self._closed = False
        self._forwards_done = 0
        self._thread = threading.Thread(target=self._run, name="tile-batcher", daemon=True)
        self._thread.start()

    def submit(self, tile: torch.Tensor, order: OrderKey) -> asyncio.Future[EncodedTile]:
        """Queue a tile; call from a running event loop.

        Args:
            tile: uint8 [3, S, S]; must not change until the result is there.
            order: Compared with the other tiles', smaller first.

        Returns:
            The tile's embeddings and timings. Cancelling it takes a waiting tile out of the queue. It fails
            with ModelError when the forward does, and with Unavailable when the batcher closes first.

        Raises:
            Unavailable: the batcher is closed.
        """
        future: asyncio.Future[EncodedTile] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise Unavailable("the encoder is shutting down")
            arrival = next(self._arrivals)
            self._waiting[arrival] = _Waiting(arrival, time.monotonic(), order, tile, future)
            self._changed.notify()
        future.add_done_callback(lambda _: self._remove(arrival))
        return future

    @property
    def forwards_done(self) -> int:
        """Forwards since the start, failed ones included: it advances as long as the encoder lives."""
        return self._forwards_done

    @property
    def tiles_queued(self) -> int:
        """Tiles that no forward has taken yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Refuse new tiles, fail the waiting ones, and return when the running forward has ended."""
        with self._changed:
            self._closed = True
            abandoned = list(self._waiting.values())
            self._waiting.clear()
            self._changed.notify()
        for waiting in abandoned:
            _settle(waiting.future, Unavailable("the encoder is shutting down"))
        self._thread.join()

    def _remove(self, arrival: int) -> None:
        with self._changed:
            self._waiting.pop(arrival, None)

    def _run(self) -> None:
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """One forward; False when closed. Its locals must not outlive it: they hold a batch of tensors."""
        batch = self._next_batch()
        for waiting, result in zip(batch, self._forward(batch), strict=True):
            _settle(waiting.future, result)
        return bool(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Block until there is something to do; empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch = list(islice(self._in_turn(), self._max_batch_tiles))
            for waiting in batch:
                del self._waiting[waiting.arrival]
            return batch

    def _in_turn(self) -> Iterator[_Waiting]:
        """Waiting tiles in the order of their turn, at most a batch of them."""
        aged_before_s = time.monotonic() - self._max_wait_s
        tiles = self._waiting.values()
        aged = list(takewhile(lambda waiting: waiting.submitted_s <= aged_before_s, tiles))
        yield from aged
        yield from heapq.nsmallest(
            self._max_batch_tiles, islice(tiles, len(aged), None), key=lambda waiting: waiting.order
        )

    def _forward(self, batch: list[_Waiting]) -> Sequence[EncodedTile | ServingError]:
        """A result for each tile; whatever goes wrong concerns the tiles of this batch only."""
        if not batch:
            return []
        start_s = time.monotonic()
        try:
            embeds = self._encode(torch.stack([waiting.tile for waiting in batch]))
            encode_ns = int((time.monotonic() - start_s) * 1e9)
            return [
                EncodedTile(_detached(embeds[index]), int((start_s - waiting.submitted_s) * 1e9), encode_ns)
                for index, waiting in enumerate(batch)
            ]
        except Exception:
            log.exception("a forward of %d tiles failed", len(batch))
            return [ModelError("the vision tower failed on this tile") for _ in batch]
        finally:
            self._forwards_done += 1


def _detached(tile: torch.Tensor) -> torch.Tensor:
    """A copy with storage of its own: whoever keeps one tile must not keep the whole batch in memory.

    By numpy, on this thread: torch would wake its pool, whose spinning costs others more than it saves.
    """
    return torch.from_numpy(tile.contiguous().view(torch.uint8).numpy().copy()).view(tile.dtype)


def _settle(future: asyncio.Future[EncodedTile], result: EncodedTile | ServingError) -> None:
    """Hand a result to the event loop that waits for it, if it still does."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(result, ServingError):
            future.set_exception(result)
        else:
            future.set_result(result)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits
        log.debug("a result came after its event loop had closed")
