"""Values of the encoder service as messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence

from encoder_service.decode_job import StoredPart
from encoder_service.medium import Medium, Part
from encoder_service.tile_stream import StreamTimings
from protos import encoder_pb2, tensor_pb2


def layout_to_proto(
    media: Sequence[Medium],
    tokens_per_tile: int,
    hidden_size: int,
    payload_dtype: tensor_pb2.DType,
    transport: encoder_pb2.Transport,
) -> encoder_pb2.EncodeResponse:
    layouts = [_medium_layout(medium, tokens_per_tile) for medium in media]
    layout = encoder_pb2.Layout(
        media=layouts, hidden_size=hidden_size, dtype=payload_dtype, transport=transport
    )
    return encoder_pb2.EncodeResponse(layout=layout)


def done_to_proto(timings: StreamTimings, total_ns: int) -> encoder_pb2.EncodeResponse:
    message = encoder_pb2.EncodeTimings(
        decode_ns=timings.decode_ns,
        tile_ns=timings.tile_ns,
        queue_ns=timings.queue_ns,
        encode_ns=timings.encode_ns,
        total_ns=total_ns,
    )
    return encoder_pb2.EncodeResponse(done=encoder_pb2.Done(timings=message))


def _medium_layout(medium: Medium, tokens: int) -> encoder_pb2.MediumLayout:
    first, *_ = medium.parts
    return encoder_pb2.MediumLayout(
        content_hash=medium.content_hash,
        width=first.width,
        height=first.height,
        columns=first.plan.columns,
        rows=first.plan.rows,
        has_thumbnail=first.plan.has_thumbnail,
        tokens_per_tile=[tokens] * medium.num_tiles,
        final=True,
        parts=[_part_layout(part, part.stored) for part in medium.parts if part.stored is not None],
    )


def _part_layout(part: Part, stored: StoredPart) -> encoder_pb2.PartLayout:
    return encoder_pb2.PartLayout(
        width=part.width,
        height=part.height,
        columns=part.plan.columns,
        rows=part.plan.rows,
        has_thumbnail=part.plan.has_thumbnail,
        num_tiles=part.plan.num_tiles,
        timestamp_s=stored.timestamp_s,
    )
