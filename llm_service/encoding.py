"""The pictures of one request on their way through the encoders: layout first, then granted tiles.

Each picture goes to the encoder that its content and their load say; those of one encoder share a stream.
When one breaks, the tiles that are still wanted from it, and only those, are asked of other encoders, and the
other streams do not notice; when there is no other, the request fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial

import torch

from llm_service.encode_stream import ArrivedTile
from llm_service.encoder_pool import EncoderConnection, EncoderPool
from llm_service.encoding_part import EncodingPart, shares
from llm_service.picture import Picture, PictureLayout, TileId
from protos.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.request_context import Metadata

MAX_REMEMBERED_LAYOUTS = 4096
# Another encoder may do better.
ENCODER_FAILURES = (Unavailable, FingerprintMismatch, Overloaded, ModelError)

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
        write: Callable[[TileId, torch.Tensor], None],
        on_tile: Callable[[TileId], None],
        on_error: Callable[[ServingError], None],
    ) -> None:
        """
        Args:
            write: Gets a wanted tile's [num_tokens, hidden_size], valid only during the call; again where
                what it got turned out to be overwritten meanwhile.
            on_tile: Called once for every wanted tile, when what was written is right.
        """
        self._pictures = pictures
        self._pool = pool
        self._layouts = layouts
        self._hidden_size = hidden_size
        self._metadata = metadata
        self._cache_salt = cache_salt
        self._priority = priority
        self._write = write
        self._on_tile = on_tile
        self._on_error = on_error
        self._wanted: set[TileId] = set()
        self._early: dict[TileId, torch.Tensor] = {}  # sent under the initial credit, not yet wanted
        self._laid_out: list[PictureLayout | None] = [None] * len(pictures)  # what the prompt was made for
        self._parts: set[EncodingPart] = set()  # not closed yet
        self._part_of: dict[int, EncodingPart] = {}  # by medium, once it is laid out
        self._opening: set[int] = set()  # media that are on their way to a part
        self._is_opening_soon = False
        self._failed: set[str] = set()
        self._has_failed = False  # and the request knows
        self._tasks: set[asyncio.Task[None]] = set()
        self.first_grant_ns = 0
        self.last_tile_ns = 0

    async def layout(self) -> list[PictureLayout]:
        """Lengths of all pictures, from memory or from encoders.

        Raises:
            InvalidRequest: a picture is refused; the field names it.
            Unavailable, FingerprintMismatch, DeadlineExceeded: no encoder can say.
            Overloaded: those that are there take no more requests.
        """
        known = [self._remembered(picture) for picture in self._pictures]
        self._laid_out = list(known)
        unknown = [medium for medium, layout in enumerate(known) if layout is None]
        if unknown:
            # Of a known picture the engine may have everything: it is sent when a tile of it is wanted.
            credit = self._pool.config.initial_credit if len(unknown) == len(known) else 0
            await self._open(unknown, credit)
        return [layout for layout in self._laid_out if layout is not None]

    def _remembered(self, picture: Picture) -> PictureLayout | None:
        """Nothing of a URL: only who fetches it knows what is there now."""
        return None if picture.url else self._layouts.get(self._cache_salt, picture.content_hash)

    def want(self, tile: TileId) -> None:
        """Ask for a tile; it comes by `write` and `on_tile`, or the request's error by `on_error`."""
        self.first_grant_ns = self.first_grant_ns or time.monotonic_ns()
        early = self._early.pop(tile, None)
        if early is not None:
            self._write(tile, early)
            self._deliver(tile)
            return
        self._wanted.add(tile)
        part = self._part_of.get(tile.medium)
        if part is not None and part.is_open:
            part.grant([tile])
        elif part is None and tile.medium not in self._opening:
            self._open_soon()
        # else a stream is being opened, or has been half-closed: asked for when that is over

    def finish(self) -> None:
        """No tile is missing now: let the encoders forget the pictures.  `want` may still come again."""
        if not self._wanted:
            self._early.clear()
            for part in self._parts:
                part.half_close()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for part in list(self._parts):
            self._close_part(part)
        if tasks:
            await asyncio.wait(tasks)

    async def _open(
        self, media: Sequence[int], initial_credit: int, failure: ServingError | None = None
    ) -> None:
        """Open streams for these pictures, retrying on other encoders, and start receiving.

        `failure` is why they are opened again, and what is raised when there is no encoder left.
        """
        self._opening.update(media)
        try:
            parts = await self._place(media)
        except (Unavailable, FingerprintMismatch) as absence:
            self._opening.difference_update(media)
            raise failure or absence from None
        credits = shares(initial_credit, parts)
        await _all(
            self._open_part(part, credit, failure) for part, credit in zip(parts, credits, strict=True)
        )

    async def _place(self, media: Sequence[int]) -> list[EncodingPart]:
        """Each picture where its content belongs; several at one encoder share a part."""
        parts: dict[str, EncodingPart] = {}
        try:
            for medium in media:
                picture, num_tiles = self._pictures[medium], self._num_expected(medium)
                connection = await self._pool.choose(
                    picture.fingerprint, picture.content_hash, num_tiles, self._failed
                )
                part = parts.get(connection.target)
                if part is None:
                    has_substitute = partial(self._has_substitute, connection, picture.fingerprint)
                    part = parts[connection.target] = EncodingPart(connection, has_substitute)
                    self._parts.add(part)
                part.add(medium, picture, num_tiles)
        except BaseException:
            for part in parts.values():
                self._close_part(part)
            raise
        return list(parts.values())

    def _has_substitute(self, connection: EncoderConnection, fingerprint: bytes) -> bool:
        return self._pool.has_candidate(fingerprint, {connection.target, *self._failed})

    def _num_expected(self, medium: int) -> int:
        """Tiles that an encoder will have to send: before the layout, the most that it can be."""
        wanted = sum(tile.medium == medium for tile in self._wanted)
        layout, picture = self._laid_out[medium], self._pictures[medium]
        if wanted or layout is None:
            return wanted or picture.max_tiles + picture.use_thumbnail
        return len(layout.tokens_per_tile)

    async def _open_part(self, part: EncodingPart, credit: int, failure: ServingError | None) -> None:
        try:
            layouts = await part.open(
                self._pool.config, self._hidden_size, self._metadata, self._cache_salt, self._priority, credit
            )
            self._accept_layouts(part, layouts)
        except ENCODER_FAILURES as error:
            self._close_part(part)
            self._give_up_on(part.connection, error)
            if not isinstance(failure, Overloaded):  # one that is full is there
                failure = error
            await self._open(part.media, credit, failure)
        except BaseException:
            self._close_part(part)
            raise
        else:
            self._opening.difference_update(part.media)
            self._grant_wanted(part)
            self._run(self._receive(part))

    def _accept_layouts(self, part: EncodingPart, layouts: Sequence[PictureLayout]) -> None:
        laid_out = list(zip(part.media, layouts, strict=True))
        for medium, layout in laid_out:  # also where it contradicts: the next request must not fail likewise
            if not self._pictures[medium].url:
                self._layouts.put(self._cache_salt, self._pictures[medium].content_hash, layout)
        for medium, layout in laid_out:
            before = self._laid_out[medium]
            if before is not None and before.fetched_hash != layout.fetched_hash:
                message = "the URL gives other bytes than when it was fetched before for this request"
                raise InvalidRequest(message, field=f"media[{medium}].url")
            if before not in (None, layout):
                raise Unavailable("the encoder lays the pictures out in another way than before")
        for medium, layout in laid_out:
            self._laid_out[medium] = layout
            self._part_of[medium] = part
        part.expect(sum(map(self._num_expected, part.media)))

    def _open_soon(self) -> None:
        """What else is wanted by then, in the same step of the engine, shares the streams."""
        if not self._is_opening_soon:
            self._is_opening_soon = True
            self._run(self._open_wanted())

    async def _open_wanted(self) -> None:
        """Tiles are wanted and no stream has them: the layout was remembered, or the stream had ended."""
        self._is_opening_soon = False
        if not self._opening:
            self._failed.clear()  # it was some time ago; the pool knows who is there now
        await self._reopen({tile.medium for tile in self._wanted})

    async def _reopen(self, media: Iterable[int], failure: ServingError | None = None) -> None:
        """Open those of which tiles are wanted and nobody has; what fails then is the request's error."""
        wanted = {tile.medium for tile in self._wanted}
        media = sorted(wanted.intersection(media) - self._part_of.keys() - self._opening)
        if media:
            try:
                await self._open(media, 0, failure)
            except ServingError as error:
                self._fail(error)

    def _grant_wanted(self, part: EncodingPart) -> None:
        tiles = [tile for tile in self._wanted if tile.medium in part.media]
        if tiles:
            part.grant(sorted(tiles, key=lambda tile: (tile.medium, tile.tile)))

    async def _receive(self, part: EncodingPart) -> None:
        def is_waiting() -> bool:
            return any(tile.medium in part.media for tile in self._wanted)

        failure: ServingError | None = None
        try:
            async for arrived in part.tiles(is_waiting):
                self._accept(part, arrived)
        except ENCODER_FAILURES as error:
            self._give_up_on(part.connection, error)
            failure = error
        except DeadlineExceeded as error:
            # The encoder ends streams that ask for nothing for a while, as those of queued requests may.
            if part.has_given_up:
                self._fail(error)
                return
        except ServingError as error:
            self._fail(error)
            return
        finally:
            self._close_part(part)
        await self._reopen(part.media, failure)  # also what was wanted after the half-close

    def _accept(self, part: EncodingPart, arrived: ArrivedTile) -> None:
        """What is not whole stays wanted."""
        tile = arrived.tile
        if tile in self._wanted:
            self._write(tile, arrived.embeds)
            if arrived.is_whole():
                self._wanted.remove(tile)
                self._deliver(tile)
        elif part.is_open:  # else nobody waits for it any more
            early = arrived.embeds.clone()  # its slot must not wait for the engine
            if arrived.is_whole():
                self._early[tile] = early

    def _deliver(self, tile: TileId) -> None:
        self.last_tile_ns = time.monotonic_ns()
        self._on_tile(tile)

    def _give_up_on(self, connection: EncoderConnection, error: ServingError) -> None:
        """For this request; for others, too, unless the encoder is only full, or failed at these pictures."""
        log.warning("encoder %s failed: %s", connection.target, error.message)
        if not isinstance(error, Overloaded | ModelError):
            self._pool.give_up(connection)
        self._failed.add(connection.target)

    def _close_part(self, part: EncodingPart) -> None:
        part.close()
        self._parts.discard(part)
        for medium in part.media:
            if self._part_of.get(medium) is part:
                del self._part_of[medium]

    def _fail(self, error: ServingError) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._on_error(error)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        """What nobody expected must end the request too, instead of letting it wait for its deadline."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("receiving visual tokens failed", exc_info=error)
            self._fail(ModelError("internal error; see the server's log"))


async def _all(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Side by side; when one fails, the others have been cancelled before its error is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
