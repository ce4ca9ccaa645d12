"""The pictures of one request on their way through an encoder: layout first, then granted tiles.

One Encode stream at a time.  When it breaks, the tiles that are still wanted, and only those, are asked of
another encoder; when there is none, the request fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence

import torch

from llm_service.encode_stream import EncodeStream, Picture, PictureLayout, TileId
from llm_service.encoder_pool import EncoderConnection, EncoderPool
from protos.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.request_context import Metadata

MAX_REMEMBERED_LAYOUTS = 4096
# Another encoder may do better.
ENCODER_FAILURES = (Unavailable, FingerprintMismatch, Overloaded)

log = logging.getLogger(__name__)


class LayoutCache:
    """Layouts of recent pictures: a known picture costs no call before a tile is missing.

    Keyed by cache salt and content hash: no caller learns from the time whether another had the picture.
    """

    def __init__(self, max_entries: int = MAX_REMEMBERED_LAYOUTS) -> None:
        self._max_entries = max_entries
        self._layouts: OrderedDict[tuple[bytes, bytes], PictureLayout] = OrderedDict()

    def get(self, cache_salt: bytes, content_hash: bytes) -> PictureLayout | None:
        key = (cache_salt, content_hash)
        layout = self._layouts.get(key)
        if layout is not None:
            self._layouts.move_to_end(key)
        return layout

    def put(self, cache_salt: bytes, content_hash: bytes, layout: PictureLayout) -> None:
        key = (cache_salt, content_hash)
        self._layouts[key] = layout
        self._layouts.move_to_end(key)
        while len(self._layouts) > self._max_entries:
            self._layouts.popitem(last=False)


class Encoding:
    """Layout and tiles of one request's pictures.  `close` ends it, whatever state it is in."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        pool: EncoderPool,
        layouts: LayoutCache,
        hidden_size: int,
        metadata: Metadata,
        cache_salt: bytes,
        priority: int,
        on_tile: Callable[[TileId, torch.Tensor], None],
        on_error: Callable[[ServingError], None],
    ) -> None:
        """`on_tile` gets every wanted tile once, [num_tokens, hidden_size], valid only during the call."""
        self._pictures = pictures
        self._pool = pool
        self._layouts = layouts
        self._hidden_size = hidden_size
        self._metadata = metadata
        self._cache_salt = cache_salt
        self._priority = priority
        self._on_tile = on_tile
        self._on_error = on_error
        self._wanted: set[TileId] = set()
        self._early: dict[TileId, torch.Tensor] = {}  # sent under the initial credit, not yet wanted
        self._laid_out: list[PictureLayout] = []  # what the prompt was made for
        self._stream: EncodeStream | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._failed: set[str] = set()
        self.first_grant_ns = 0
        self.last_tile_ns = 0

    async def layout(self) -> list[PictureLayout]:
        """Lengths of all pictures, from memory or from an encoder.

        Raises:
            InvalidRequest: a picture is refused; the field names it.
            Unavailable, FingerprintMismatch, DeadlineExceeded: no encoder can say.
            Overloaded: those that are there take no more requests.
        """
        known = [self._layouts.get(self._cache_salt, picture.content_hash) for picture in self._pictures]
        remembered = [layout for layout in known if layout is not None]
        if len(remembered) == len(known):
            self._laid_out = remembered
        else:
            await self._open(0 if remembered else self._pool.config.initial_credit)
        return self._laid_out

    def want(self, tile: TileId) -> None:
        """Ask for a tile; it comes through `on_tile`, or the request's error through `on_error`."""
        self.first_grant_ns = self.first_grant_ns or time.monotonic_ns()
        early = self._early.pop(tile, None)
        if early is not None:
            self._deliver(tile, early)
            return
        self._wanted.add(tile)
        if self._stream is not None and self._stream.is_open:
            self._stream.grant([tile])
        elif self._receiver is None or self._receiver.done():
            self._failed.clear()  # it was some time ago; the pool knows who is there now
            self._receive_in_task(self._reopen())

    def finish(self) -> None:
        """No tile is missing now: let the encoder forget the pictures.  `want` may still come again."""
        if not self._wanted and self._stream is not None:
            self._early.clear()
            self._stream.half_close()

    async def close(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
        if self._stream is not None:
            self._stream.close()
        if self._receiver is not None:
            await asyncio.wait([self._receiver])
        self._receiver = self._stream = None  # they know us too: pictures must not wait for the collector

    async def _open(self, initial_credit: int) -> None:
        """Open a stream, retrying on other encoders, and start receiving."""
        failure: ServingError | None = None
        while True:
            try:
                first = self._pictures[0]
                connection = await self._pool.choose(first.fingerprint, first.content_hash, self._failed)
            except (Unavailable, FingerprintMismatch) as absence:
                raise failure or absence from None
            stream = EncodeStream(connection, self._pool.config, self._pictures, self._hidden_size)
            try:
                layouts = await stream.open(self._metadata, self._cache_salt, self._priority, initial_credit)
                if self._laid_out not in ([], layouts):
                    raise Unavailable("the encoder lays the pictures out in another way than before")
            except ENCODER_FAILURES as error:
                stream.close()
                self._give_up_on(connection, error)
                if not isinstance(failure, Overloaded):  # one that is full is there
                    failure = error
                continue
            except BaseException:
                stream.close()
                raise
            for picture, layout in zip(self._pictures, layouts, strict=True):
                self._layouts.put(self._cache_salt, picture.content_hash, layout)
            self._laid_out = layouts
            self._stream = stream
            self._receive_in_task(self._receive(stream))
            return

    def _receive_in_task(self, work: Coroutine[None, None, None]) -> None:
        self._receiver = asyncio.create_task(work)
        self._receiver.add_done_callback(self._report_bug)

    def _report_bug(self, receiver: asyncio.Task[None]) -> None:
        """What nobody expected must end the request too, instead of letting it wait for its deadline."""
        error = None if receiver.cancelled() else receiver.exception()
        if error is not None:
            log.error("receiving visual tokens failed", exc_info=error)
            self._on_error(ModelError("internal error; see the server's log"))

    async def _reopen(self) -> None:
        """A tile is wanted and no stream is open: the layout was remembered, or the stream had ended."""
        try:
            await self._open(0)
        except ServingError as error:
            self._on_error(error)
            return
        self._grant_wanted()

    def _grant_wanted(self) -> None:
        assert self._stream is not None
        if self._wanted:
            self._stream.grant(sorted(self._wanted, key=lambda tile: (tile.medium, tile.tile)))

    async def _receive(self, stream: EncodeStream) -> None:
        try:
            async for tile, embeds in stream.tiles(is_waiting=lambda: bool(self._wanted)):
                self._accept(stream, tile, embeds)
        except ENCODER_FAILURES as error:
            stream.close()
            await self._fail_over(stream.connection, error)
        except ServingError as error:
            stream.close()
            await self._end(stream, error)
        else:
            stream.close()
            if self._wanted:  # asked for after the half-close
                await self._reopen()

    async def _end(self, stream: EncodeStream, error: ServingError) -> None:
        """The encoder ends streams that ask for nothing for a while, as those of queued requests may."""
        if not isinstance(error, DeadlineExceeded) or stream.has_given_up:
            self._on_error(error)
        elif self._wanted:
            await self._reopen()

    async def _fail_over(self, connection: EncoderConnection, error: ServingError) -> None:
        self._give_up_on(connection, error)
        if not self._wanted:
            return
        try:
            await self._open(0)
        except Unavailable:
            self._on_error(error)
        except ServingError as other:
            self._on_error(other)
        else:
            self._grant_wanted()

    def _give_up_on(self, connection: EncoderConnection, error: ServingError) -> None:
        """For this request; for others, too, unless the encoder is only full."""
        log.warning("encoder %s failed: %s", connection.target, error.message)
        if not isinstance(error, Overloaded):
            connection.mark_dead()
        self._failed.add(connection.target)

    def _accept(self, stream: EncodeStream, tile: TileId, embeds: torch.Tensor) -> None:
        if tile in self._wanted:
            self._wanted.remove(tile)
            self._deliver(tile, embeds)
        elif stream.is_open:  # else nobody waits for it any more
            self._early[tile] = embeds

    def _deliver(self, tile: TileId, embeds: torch.Tensor) -> None:
        self.last_tile_ns = time.monotonic_ns()
        self._on_tile(tile, embeds)
