"""The messages that a front end sends on an Encode call: the opening, media in pieces, grants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from llm_service.picture import Picture, TileId
from protos import encoder_pb2, tensor_pb2
from protos.media import FrameSampling, MediaKind
from protos.options import MAX_CHUNK_BYTES
from protos.request_context import Metadata

_KINDS = {
    MediaKind.IMAGE: encoder_pb2.MEDIA_KIND_IMAGE,
    MediaKind.VIDEO: encoder_pb2.MEDIA_KIND_VIDEO,
    MediaKind.DOCUMENT: encoder_pb2.MEDIA_KIND_DOCUMENT,
}


def open_request(
    pictures: Sequence[Picture],
    payload_dtypes: Sequence[tensor_pb2.DType],
    metadata: Metadata,
    cache_salt: bytes,
    priority: int,
    initial_credit: int,
    ring_nonce: bytes,
) -> encoder_pb2.EncodeRequest:
    """Without the nonce of a ring that is mapped here tiles come inline."""
    opening = encoder_pb2.Open(
        request_id=dict(metadata).get("x-request-id", ""),
        media=map(_medium, pictures),
        payload_dtypes=payload_dtypes,
        transports=[encoder_pb2.TRANSPORT_INLINE],
        initial_credit=initial_credit,
        cache_salt=cache_salt,
        priority=priority,
        expected_fingerprint=pictures[0].fingerprint,
    )
    if ring_nonce:
        opening.transports.append(encoder_pb2.TRANSPORT_SHARED_MEMORY)
        opening.ring_nonce = ring_nonce
    return encoder_pb2.EncodeRequest(open=opening)


def chunk_requests(pictures: Sequence[Picture]) -> Iterator[encoder_pb2.EncodeRequest]:
    """The bytes of all media, in order."""
    for medium, picture in enumerate(pictures):
        for start in range(0, len(picture.data), MAX_CHUNK_BYTES):
            data = picture.data[start : start + MAX_CHUNK_BYTES]
            yield encoder_pb2.EncodeRequest(chunk=encoder_pb2.MediaChunk(medium=medium, data=data))


def grant_request(tiles: Sequence[TileId], slots: Sequence[int]) -> encoder_pb2.EncodeRequest:
    """In this order, runs of neighbours as one range; `slots` have been read."""
    ranges: list[encoder_pb2.TileRange] = []
    for tile in tiles:
        last = ranges[-1] if ranges else None
        if last is not None and (tile.medium, tile.tile) == (last.medium, last.first_tile + last.num_tiles):
            last.num_tiles += 1
        else:
            ranges.append(encoder_pb2.TileRange(medium=tile.medium, first_tile=tile.tile, num_tiles=1))
    return encoder_pb2.EncodeRequest(grant=encoder_pb2.Grant(tiles=ranges, slots=slots))


def _medium(picture: Picture) -> encoder_pb2.Medium:
    return encoder_pb2.Medium(
        kind=_KINDS[picture.kind],
        num_bytes=len(picture.data),
        url=picture.url,
        tiling=encoder_pb2.TilingOptions(
            min_tiles=picture.min_tiles,
            max_tiles=picture.max_tiles,
            use_thumbnail=picture.use_thumbnail,
        ),
        sampling=_sampling(picture.sampling),
    )


def _sampling(sampling: FrameSampling | None) -> encoder_pb2.FrameSampling | None:
    """As resolved here, so that both halves hash the same."""
    if sampling is None:
        return None
    return encoder_pb2.FrameSampling(
        num_frames=sampling.num_frames,
        fps=sampling.fps or None,
        start_s=sampling.start_s,
        end_s=sampling.end_s if sampling.end_s < math.inf else None,
    )
