"""Prometheus series of the encoder: what an operator scales and alerts on."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from encoder_service.tile_cache import TileCache
    from encoder_service.tile_flights import TileFlights
    from encoder_service.tile_stream import StreamTimings

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

TILES_QUEUED = Gauge("tessera_encoder_tiles_queued", "Tiles waiting for the tower")
FORWARDS = Gauge("tessera_encoder_forwards", "Forwards of the tower since the start")
STREAMS_OPEN = Gauge("tessera_encoder_streams_open", "Encode streams in progress")
PIXEL_BYTES = Gauge("tessera_encoder_pixel_bytes", "Memory charged for decoded pictures, in bytes")
CACHE_HITS = Gauge(
    "tessera_encoder_cache_hits", "Wanted tiles that the cache held, since the start", ["tier"]
)
CACHE_MISSES = Gauge("tessera_encoder_cache_misses", "Wanted tiles that had to be made, since the start")
CACHE_JOINS = Gauge("tessera_encoder_cache_joins", "Wanted tiles that were on their way, since the start")
CACHE_EVICTIONS = Gauge(
    "tessera_encoder_cache_evictions", "Tiles that had to make room, since the start", ["tier"]
)
CACHE_BYTES = Gauge("tessera_encoder_cache_bytes", "Memory of cached tiles, in bytes", ["tier"])
RING_SLOTS = Gauge(
    "tessera_encoder_ring_slots_in_use", "Slots of the tile ring that forwards and clients hold"
)
TILES_SENT = Counter("tessera_encoder_tiles_sent_total", "Tiles sent, by how they went", ["transport"])
TILES_SENT_INLINE = TILES_SENT.labels("inline")
TILES_SENT_IN_SLOTS = TILES_SENT.labels("shared-memory")
DECODERS_ENDED = Counter(
    "tessera_encoder_decoders_ended",
    "Processes that decoded a video or document and were ended by it or because of it",
    ["reason"],
)
STAGE_SECONDS = Histogram(
    "tessera_encoder_stage_seconds",
    "Where the time of finished streams went, summed over their tiles",
    ["stage"],
    buckets=SECONDS,
)


def observe(timings: StreamTimings) -> None:
    for stage in ("decode", "tile", "queue", "encode", "transfer"):
        STAGE_SECONDS.labels(stage).observe(getattr(timings, f"{stage}_ns") / 1e9)


def watch_tiles(cache: TileCache, flights: TileFlights) -> None:
    """Let the gauges of the cache and of shared work read them whenever they are asked."""
    CACHE_MISSES.set_function(lambda: cache.num_misses)
    CACHE_JOINS.set_function(lambda: flights.num_joins)
    for name, tier in (("device", cache.device), ("host", cache.host)):
        CACHE_HITS.labels(name).set_function(partial(getattr, tier, "num_hits"))
        CACHE_EVICTIONS.labels(name).set_function(partial(getattr, tier, "num_evictions"))
        CACHE_BYTES.labels(name).set_function(partial(getattr, tier, "used_bytes"))
