"""Prometheus series of the encoder: what an operator scales and alerts on."""

from __future__ import annotations

from prometheus_client import Gauge, Histogram

from encoder_service.tile_stream import StreamTimings

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

TILES_QUEUED = Gauge("tessera_encoder_tiles_queued", "Tiles waiting for the tower")
FORWARDS = Gauge("tessera_encoder_forwards", "Forwards of the tower since the start")
STREAMS_OPEN = Gauge("tessera_encoder_streams_open", "Encode streams in progress")
PIXEL_BYTES = Gauge("tessera_encoder_pixel_bytes", "Memory charged for decoded pictures, in bytes")
STAGE_SECONDS = Histogram(
    "tessera_encoder_stage_seconds",
    "Where the time of finished streams went, summed over their tiles",
    ["stage"],
    buckets=SECONDS,
)


def observe(timings: StreamTimings) -> None:
    for stage in ("decode", "tile", "queue", "encode", "transfer"):
        STAGE_SECONDS.labels(stage).observe(getattr(timings, f"{stage}_ns") / 1e9)
