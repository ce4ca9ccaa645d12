"""What a medium's headers tell: its parts, their tiles and its content hash.  No pixel is decoded."""

from __future__ import annotations

from functools import partial

from encoder_service.decode_job import StoredPart
from encoder_service.from_proto import AnnouncedMedium
from encoder_service.media import ImageHeader, read_header
from encoder_service.medium import Medium, Part
from encoder_service.tile_stream import TileWorkers
from encoder_service.tiling import TilePlan, plan_tiles
from protos.fingerprint import content_hash
from protos.media import FrameSampling, MediaKind


class HeaderReader:
    """Pictures' headers are read on a thread, those of videos and documents in decoder processes."""

    def __init__(self, workers: TileWorkers) -> None:
        self._workers = workers

    async def read(self, announced: AnnouncedMedium, data: bytes, fingerprint: bytes, field: str) -> Medium:
        """Raises InvalidRequest naming `field`."""
        if announced.kind is MediaKind.IMAGE:
            picture = partial(self._read_picture, announced, data, fingerprint, field)
            return await self._workers.in_thread(picture)
        sampling = announced.sampling or FrameSampling()
        format, stored = await self._workers.containers.open(announced.kind, data, sampling, field)
        parts = [Part(part.width, part.height, self._plan(announced, part), part) for part in stored]
        digest = await self._workers.in_thread(partial(_content_hash, announced, data, fingerprint))
        return Medium.container(announced.kind, format, data, digest, parts)

    def _read_picture(
        self, announced: AnnouncedMedium, data: bytes, fingerprint: bytes, field: str
    ) -> Medium:
        header = read_header(data, self._workers.image_limits, field)
        part = Part(header.width, header.height, self._plan(announced, header))
        return Medium.picture(data, _content_hash(announced, data, fingerprint), part, header.decode_bytes)

    def _plan(self, announced: AnnouncedMedium, part: ImageHeader | StoredPart) -> TilePlan:
        return plan_tiles(part.width, part.height, announced.tiling, self._workers.image_size)


def _content_hash(announced: AnnouncedMedium, data: bytes, fingerprint: bytes) -> bytes:
    tiling = announced.tiling
    return content_hash(
        data,
        tiling.min_tiles,
        tiling.max_tiles,
        tiling.use_thumbnail,
        fingerprint,
        announced.kind,
        announced.sampling,
    )
