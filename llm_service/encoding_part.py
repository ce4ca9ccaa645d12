"""Some pictures of a request at one encoder: their numbers in the stream, and what load they are to it.

Knows neither the request's other pictures nor other encoders.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace

from llm_service.config import EncoderPoolConfig
from llm_service.encode_stream import ArrivedTile, EncodeStream
from llm_service.encoder_pool import EncoderConnection
from llm_service.picture import Picture, PictureLayout, TileId
from protos.errors import ServingError
from protos.request_context import Metadata

_MEDIUM_FIELD = re.compile(r"media\[(\d+)\](.*)")


class EncodingPart:
    """Add the pictures, open it, read it, close it.  Media are numbered as in the request, also in errors."""

    def __init__(self, connection: EncoderConnection, has_substitute: Callable[[], bool]) -> None:
        """`has_substitute` says whether another encoder could do the same now."""
        self.connection = connection
        self._has_substitute = has_substitute
        self.media: list[int] = []
        self._pictures: list[Picture] = []
        self._stream: EncodeStream | None = None
        self._load = 0  # tiles that its encoder has yet to send

    def add(self, medium: int, picture: Picture, num_tiles: int) -> None:
        """Before it is opened; `num_tiles` as far as anybody knows."""
        assert self._stream is None
        self.media.append(medium)
        self._pictures.append(picture)
        self.expect(self._load + num_tiles)

    def expect(self, num_tiles: int) -> None:
        """So many tiles are still to come."""
        self.connection.load.own += num_tiles - self._load
        self._load = num_tiles

    async def open(
        self,
        config: EncoderPoolConfig,
        hidden_size: int,
        metadata: Metadata,
        cache_salt: bytes,
        priority: int,
        initial_credit: int,
    ) -> list[PictureLayout]:
        """Send the pictures; returns their layouts.

        Raises:
            ServingError: what the encoder refused; Unavailable when it does not answer properly.
        """
        self._stream = EncodeStream(
            self.connection, config, self._pictures, hidden_size, self._has_substitute
        )
        try:
            return await self._stream.open(metadata, cache_salt, priority, initial_credit)
        except ServingError as error:
            raise self._in_words_of_the_request(error) from None

    @property
    def is_open(self) -> bool:
        """More tiles can be granted."""
        return self._stream is not None and self._stream.is_open

    @property
    def has_given_up(self) -> bool:
        """It was our watchdog that ended the stream."""
        return self._stream is not None and self._stream.has_given_up

    def grant(self, tiles: Collection[TileId]) -> None:
        assert self._stream is not None
        numbers = {medium: number for number, medium in enumerate(self.media)}
        self._stream.grant([TileId(numbers[tile.medium], tile.tile) for tile in tiles])
        self.expect(max(self._load, self._stream.num_due))  # it was opened for the tiles wanted by then

    async def tiles(self, is_waiting: Callable[[], bool]) -> AsyncIterator[ArrivedTile]:
        """As those of the stream."""
        assert self._stream is not None
        try:
            async for arrived in self._stream.tiles(is_waiting):
                self.expect(max(0, self._load - 1))
                tile = arrived.tile
                yield replace(arrived, tile=TileId(self.media[tile.medium], tile.tile))
        except ServingError as error:
            raise self._in_words_of_the_request(error) from None

    def half_close(self) -> None:
        """Nothing more will be granted."""
        self.expect(0)
        if self._stream is not None:
            self._stream.half_close()

    def close(self) -> None:
        """Synchronous and idempotent."""
        self.expect(0)
        if self._stream is not None:
            self._stream.close()
            self._stream = None  # it knows us too: pictures must not wait for the collector

    def _in_words_of_the_request(self, error: ServingError) -> ServingError:
        match = _MEDIUM_FIELD.fullmatch(error.field or "")
        if match is not None and int(match[1]) < len(self.media):
            error.field = f"media[{self.media[int(match[1])]}]{match[2]}"
        return error


def shares(total: int, parts: Sequence[EncodingPart]) -> list[int]:
    """`total` divided by the number of pictures, the rest to the first: prefill begins there."""
    num_pictures = sum(len(part.media) for part in parts)
    divided = [total * len(part.media) // num_pictures for part in parts]
    return [divided[0] + total - sum(divided), *divided[1:]]
