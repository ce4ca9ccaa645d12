"""What an Encode stream answers while its grants are served: tiles, in a slot or inline, and heartbeats."""

from __future__ import annotations

import asyncio

from encoder_service import metrics
from encoder_service.batcher import TileBatcher
from encoder_service.medium import Medium
from encoder_service.slot_lease import SlotLease
from encoder_service.tile_stream import MAX_WAITING_GRANTS, FinishedTile, GrantedTile, TileStream
from protos import encoder_pb2, tensor_pb2
from protos.errors import DeadlineExceeded, InvalidRequest
from protos.frames import EncodeEvent, TileFrame
from protos.options import HEARTBEAT_INTERVAL_S
from protos.quantized import quantize
from protos.tensors import tensor_bytes

# A message costs about as much as copying half a tile; a client should not wait for many copies either.
MAX_TILES_OF_MESSAGE = 8


class StreamWriter:
    """One stream; `media` and what is granted grow while it runs."""

    def __init__(
        self,
        tiles: TileStream,
        media: list[Medium],
        slots: SlotLease,
        batcher: TileBatcher,
        payload_dtype: tensor_pb2.DType,
        idle_timeout_s: float,
    ) -> None:
        self._tiles = tiles
        self._media = media
        self._slots = slots
        self._batcher = batcher
        self._is_quantized = payload_dtype == tensor_pb2.DTYPE_FLOAT8_E4M3
        self._idle_timeout_s = idle_timeout_s
        self._behind: TileFrame | None = None  # the event after the last one

    def add(self, initial_credit: int, medium: Medium) -> None:
        """The next medium; its tiles within the initial credit are granted.

        Raises:
            InvalidRequest: more tiles wait than a stream may have.
        """
        left = max(initial_credit - sum(other.num_tiles for other in self._media), 0)
        granted = [GrantedTile(len(self._media), tile) for tile in range(min(medium.num_tiles, left))]
        self._media.append(medium)
        self._tiles.grant(granted)
        if self._tiles.num_waiting > MAX_WAITING_GRANTS:
            message = f"more than {MAX_WAITING_GRANTS} tiles within the initial credit wait"
            raise InvalidRequest(message, field="initial_credit")

    async def next_event(self) -> EncodeEvent | None:
        """The next tile, a heartbeat when none came for a while, None at the end.

        Raises:
            DeadlineExceeded: the client has all that it granted and grants no more.
        """
        if self._behind is not None:
            behind, self._behind = self._behind, None
            return behind
        try:
            # A timer is not free, and most tiles are there.
            async with asyncio.timeout(None if self._tiles.has_tile else HEARTBEAT_INTERVAL_S):
                finished = await self._tiles.next_tile()
        except TimeoutError:
            if self._tiles.idle_s > self._idle_timeout_s:
                raise DeadlineExceeded(
                    f"no tile was granted for {self._idle_timeout_s:g} s", field="grant"
                ) from None
            return self._heartbeat()
        if finished is None:
            return None
        tile = await self._send(finished)
        if isinstance(tile, TileFrame):
            return tile
        return encoder_pb2.EncodeResponse(tiles=encoder_pb2.TilesInSlots(tiles=await self._joined(tile)))

    async def _joined(self, first: encoder_pb2.Tile) -> list[encoder_pb2.Tile]:
        """A tile in its slot, and those behind it that are ready, up to one that must go inline."""
        tiles = [first]
        while len(tiles) < MAX_TILES_OF_MESSAGE and self._tiles.has_tile and self._slots.has_slot:
            finished = await self._tiles.next_tile()
            assert finished is not None
            tile = await self._send(finished)
            if isinstance(tile, TileFrame):
                self._behind = tile
                break
            tiles.append(tile)
        return tiles

    async def _send(self, finished: FinishedTile) -> encoder_pb2.Tile | TileFrame:
        """Put the tile into its slot, or make a frame of it."""
        payload = await self._payload(finished)
        await self._slots.wait()
        tile = encoder_pb2.Tile(
            medium=finished.granted.medium,
            tile=finished.granted.tile,
            num_tokens=finished.embeds.shape[0],
        )
        placed = self._slots.place(payload)
        if placed is None:
            metrics.TILES_SENT_INLINE.inc()
            return TileFrame(tile, payload)
        metrics.TILES_SENT_IN_SLOTS.inc()
        tile.slot, tile.sequence = placed.slot, placed.sequence
        return tile

    async def _payload(self, finished: FinishedTile) -> memoryview:
        if self._is_quantized:
            # Not on a decoding thread: behind large pictures it would outlast the client's heartbeats.
            return await asyncio.to_thread(quantize, finished.embeds)
        return tensor_bytes(finished.embeds)

    def _heartbeat(self) -> encoder_pb2.EncodeResponse:
        heartbeat = encoder_pb2.Heartbeat(
            forwards_done=self._batcher.forwards_done, tiles_queued=self._batcher.tiles_queued
        )
        return encoder_pb2.EncodeResponse(heartbeat=heartbeat)
