"""Tiles of concurrent requests, gathered into forwards on one worker thread, by turns of their streams.

Knows nothing about pictures, models or transport: `encode` maps a batch of tiles to a batch of embeddings.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, takewhile
from typing import Protocol

import torch

from encoder_service.batch_size import BatchSizes
from protos.errors import ModelError, ServingError, Unavailable

log = logging.getLogger(__name__)

# Where forwards can be queued on a device: one that runs and the next.
FORWARDS_IN_PROGRESS = 2
# A forward takes less; on a small CPU a large tower may take longer, and is not waited for.
CLOSE_TIMEOUT_S = 30.0

# What a tile is ordered by, smaller first: (priority of the request, how many turns its stream has had).
OrderKey = tuple[int, ...]


@dataclass(frozen=True)
class EncodedTile:
    embeds: torch.Tensor  # [num_tokens, hidden_size] on the host
    queue_ns: int  # waiting for a place in a forward, and for that forward to begin
    encode_ns: int  # the forward that it shared
    transfer_ns: int  # of that forward's embeddings to the host, where it is told apart
    on_device: torch.Tensor | None = None  # the same, where the device keeps tiles for a cache


@dataclass(frozen=True)
class ForwardResult:
    embeds: Sequence[torch.Tensor]  # a [num_tokens, hidden_size] of each tile, each with storage of its own
    encode_ns: int
    transfer_ns: int
    on_device: Sequence[torch.Tensor] = ()  # of each tile, each with storage of its own; or none


class Forward(Protocol):
    """A forward that has begun, or is in a device's queue."""

    def result(self) -> ForwardResult:
        """Wait for it; called once."""


# Begins a forward of tiles, uint8 [3, S, S] each, and returns without waiting for it.
Launch = Callable[[Sequence[torch.Tensor]], Forward]


@dataclass(frozen=True, eq=False)
class _Waiting:
    arrival: int
    submitted_s: float
    order: OrderKey
    tile: torch.Tensor  # uint8 [3, S, S]
    future: asyncio.Future[EncodedTile]


@dataclass(frozen=True, eq=False)
class _Launched:
    batch: list[_Waiting]
    forward: Forward | None  # None: it could not begin


class TileBatcher:
    """Queue in front of an encoder that runs one forward at a time.

    With `launch`, the next forward is in the device's queue while one runs, so that the device never waits
    for the host; a second thread waits for the results.

    A free worker takes what waits, up to the batch size, and never waits for more. Smaller orders are
    taken first, first come first served among equals; a tile that has waited `max_wait_s` goes before all of
    them, so a stream of new pictures starves nobody.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        sizes: BatchSizes,
        max_wait_s: float = 2.0,
        launch: Launch | None = None,
    ) -> None:
        """
        Args:
            encode: Maps uint8 [num_tiles, 3, S, S] to embeddings whose first dimension is num_tiles.
            launch: Used instead of `encode` where forwards can be queued on a device.
        """
        self._launch = launch or partial(_HostForward, encode)
        self._most_in_progress = 1 if launch is None else FORWARDS_IN_PROGRESS
        self._sizes = sizes
        self._max_wait_s = max_wait_s
        self._arrivals = count()
        self._waiting: dict[int, _Waiting] = {}  # by arrival, oldest first
        self._changed = threading.Condition()
        self._closed = False
        self._forwards_done = 0
        self._num_in_progress = 0
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="tile-batcher", daemon=True)]
        if launch is not None:
            self._threads.append(threading.Thread(target=self._finish_all, name="tile-results", daemon=True))
        for thread in self._threads:
            thread.start()

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
            self._changed.notify_all()
        future.add_done_callback(lambda _: self._remove(arrival))
        return future

    def hasten(self, future: asyncio.Future[EncodedTile], order: OrderKey) -> None:
        """Let a tile take its turn by a smaller order, if no forward has taken it yet."""
        with self._changed:
            for waiting in self._waiting.values():
                if waiting.future is future:
                    sooner = replace(waiting, order=min(order, waiting.order))
                    self._waiting[waiting.arrival] = sooner
                    return

    @property
    def forwards_done(self) -> int:
        """Forwards since the start, failed ones included: it advances as long as the encoder lives."""
        return self._forwards_done

    @property
    def tiles_queued(self) -> int:
        """Tiles that no forward has taken yet."""
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Whether tiles wait or a forward is in progress."""
        return bool(self._waiting or self._num_in_progress)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Refuse new tiles, fail the waiting ones, and return when the running forwards have ended.

        Or when they hang: that must not keep the process.
        """
        with self._changed:
            self._closed = True
            abandoned = list(self._waiting.values())
            self._waiting.clear()
            self._changed.notify_all()
        shutting_down = Unavailable("the encoder is shutting down")
        _settle([waiting.future for waiting in abandoned], [shutting_down] * len(abandoned))
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
            if thread.is_alive():
                log.error("the tower has not ended within %g s", timeout_s)
                return

    def _remove(self, arrival: int) -> None:
        with self._changed:
            self._waiting.pop(arrival, None)

    def _run(self) -> None:
        while self._serve_batch():
            pass
        self._launched.put(None)

    def _serve_batch(self) -> bool:
        """One forward; False when closed. Its locals must not outlive it: they hold a batch of tensors."""
        batch = self._next_batch()
        if not batch:
            return False
        launched = _Launched(batch, self._begin(batch))
        if len(self._threads) == 1:
            self._finish(launched)
        else:
            self._launched.put(launched)
        return True

    def _finish_all(self) -> None:
        while self._finish_next():
            pass

    def _finish_next(self) -> bool:
        """The oldest forward in progress; False when closed. Its locals must not outlive it."""
        launched = self._launched.get()
        if launched is not None:
            self._finish(launched)
        return launched is not None

    def _next_batch(self) -> list[_Waiting]:
        """Block until there is something to do; empty when closed."""
        with self._changed:
            self._changed.wait_for(self._may_begin)
            most = self._sizes.most if self._num_in_progress else self._sizes.first
            batch = list(islice(self._in_turn(), most))
            for waiting in batch:
                del self._waiting[waiting.arrival]
            self._num_in_progress += bool(batch)
            return batch

    def _may_begin(self) -> bool:
        return self._closed or bool(self._waiting and self._num_in_progress < self._most_in_progress)

    def _in_turn(self) -> Iterator[_Waiting]:
        """Waiting tiles in the order of their turn, at most a batch of them."""
        aged_before_s = time.monotonic() - self._max_wait_s
        tiles = self._waiting.values()
        aged = list(takewhile(lambda waiting: waiting.submitted_s <= aged_before_s, tiles))
        yield from aged
        yield from heapq.nsmallest(
            self._sizes.most, islice(tiles, len(aged), None), key=lambda waiting: waiting.order
        )

    def _begin(self, batch: list[_Waiting]) -> Forward | None:
        try:
            return self._launch([waiting.tile for waiting in batch])
        except Exception:
            log.exception("a forward of %d tiles could not begin", len(batch))
            return None

    def _finish(self, launched: _Launched) -> None:
        results = self._results(launched)
        self._forwards_done += 1
        with self._changed:
            self._num_in_progress -= 1
            self._changed.notify_all()
        _settle([waiting.future for waiting in launched.batch], results)

    def _results(self, launched: _Launched) -> Sequence[EncodedTile | ServingError]:
        """A result for each tile; whatever goes wrong concerns the tiles of this batch only."""
        try:
            if launched.forward is not None:
                return _encoded_tiles(launched.batch, launched.forward.result())
        except Exception:
            log.exception("a forward of %d tiles failed", len(launched.batch))
        return [ModelError("the vision tower failed on this tile") for _ in launched.batch]


class _HostForward:
    """`encode` of one batch on the calling thread."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], tiles: Sequence[torch.Tensor]) -> None:
        self._encode = encode
        self._tiles = tiles

    def result(self) -> ForwardResult:
        start = time.monotonic_ns()
        embeds = self._encode(torch.stack(list(self._tiles)))
        encode_ns = time.monotonic_ns() - start
        return ForwardResult([detached(embeds[index]) for index in range(len(self._tiles))], encode_ns, 0)


def _encoded_tiles(batch: Sequence[_Waiting], result: ForwardResult) -> list[EncodedTile]:
    """What was neither the forward nor the transfer was waiting."""
    busy_s = (result.encode_ns + result.transfer_ns) * 1e-9
    now_s = time.monotonic()
    kept: Sequence[torch.Tensor | None] = result.on_device or [None] * len(batch)
    return [
        EncodedTile(
            embeds,
            max(0, int((now_s - busy_s - waiting.submitted_s) * 1e9)),
            result.encode_ns,
            result.transfer_ns,
            on_device,
        )
        for waiting, embeds, on_device in zip(batch, result.embeds, kept, strict=True)
    ]


def detached(tile: torch.Tensor) -> torch.Tensor:
    """A copy with storage of its own: whoever keeps one tile must not keep the whole batch in memory.

    By numpy, on this thread: torch would wake its pool, whose spinning costs others more than it saves.
    """
    return torch.from_numpy(tile.contiguous().view(torch.uint8).numpy().copy()).view(tile.dtype)


def _settle(
    futures: Sequence[asyncio.Future[EncodedTile]], results: Sequence[EncodedTile | ServingError]
) -> None:
    """Hand results to the event loops that wait for them, where somebody still does; each loop wakes once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[partial[None]]] = {}
    for future, result in zip(futures, results, strict=True):
        by_loop.setdefault(future.get_loop(), []).append(partial(_set, future, result))
    for loop, settings in by_loop.items():
        try:
            loop.call_soon_threadsafe(_call_all, settings)
        except RuntimeError:  # the loop is closed: nobody waits
            log.debug("results came after their event loop had closed")


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _set(future: asyncio.Future[EncodedTile], result: EncodedTile | ServingError) -> None:
    if future.done():
        return
    if isinstance(result, ServingError):
        future.set_exception(result)
    else:
        future.set_result(result)
