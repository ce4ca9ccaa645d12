"""Every finished stream is counted by where its time went, and every wanted tile by where it came from."""

from __future__ import annotations

import asyncio

import pytest
import torch
from prometheus_client import REGISTRY

from encoder_service import metrics
from encoder_service.batch_size import BatchSizes
from encoder_service.batcher import EncodedTile, TileBatcher
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_stream import StreamTimings


def test_stages_are_observed_in_seconds() -> None:
    def read(stage: str) -> float:
        return REGISTRY.get_sample_value("tessera_encoder_stage_seconds_sum", {"stage": stage}) or 0.0

    before = {stage: read(stage) for stage in ("decode", "encode")}
    metrics.observe(StreamTimings(decode_ns=2_000_000_000, encode_ns=500_000_000))
    after = {stage: read(stage) for stage in ("decode", "encode")}
    assert after == pytest.approx({"decode": before["decode"] + 2, "encode": before["encode"] + 0.5})


async def test_wanted_tiles_are_counted_by_where_they_came_from() -> None:
    batcher = TileBatcher(lambda tiles: tiles, BatchSizes(1, 1))
    cache = TileCache(100, 50, to_host=torch.clone)
    flights = TileFlights(batcher, cache)
    metrics.watch_tiles(cache, flights)
    tile = EncodedTile(torch.zeros(10), 1, 1, 1, on_device=torch.zeros(10))
    for number in range(4):  # of 40 bytes: one stays on the device, two on the host
        cache.put((b"", b"", number), tile)
    claims = [flights.claim((b"", b"", number), (0,), lambda claim: None) for number in (3, 1, 2, 0, 0, 0)]

    def read(name: str, tier: str | None = None) -> float | None:
        return REGISTRY.get_sample_value(f"tessera_encoder_cache_{name}", {"tier": tier} if tier else {})

    assert [read("hits", tier) for tier in ("device", "host")] == [1, 2]
    assert [read("evictions", tier) for tier in ("device", "host")] == [3, 1]
    assert [read("bytes", tier) for tier in ("device", "host")] == [40, 80]
    assert (read("misses"), read("joins")) == (1, 2)
    for claim in claims:
        flights.leave(claim)
    await asyncio.to_thread(cache.close)
    await asyncio.to_thread(batcher.close)
