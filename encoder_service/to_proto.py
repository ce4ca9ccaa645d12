"""Values of the encoder service as messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence

from encoder_service.tile_stream import Medium, StreamTimings
from protos import encoder_pb2, tensor_pb2


def layout_to_proto(
    media: Sequence[Medium],
    tokens_per_tile: int,
    hidden_size: int,
    payload_dtype: tensor_pb2.DType,
    transport: encoder_pb2.Transport,
) -> encoder_pb2.EncodeResponse:
    layouts = [
        encoder_pb2.MediumLayout(
            content_hash=medium.content_hash,
            width=medium.width,
            height=medium.height,
            columns=medium.plan.columns,
            rows=medium.plan.rows,
            has_thumbnail=medium.plan.has_thumbnail,
            tokens_per_tile=[tokens_per_tile] * medium.plan.num_tiles,
            final=True,
        )
        for medium in media
    ]
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
