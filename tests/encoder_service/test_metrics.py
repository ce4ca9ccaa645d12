"""Every finished stream is counted by where its time went."""

from __future__ import annotations

from prometheus_client import REGISTRY

from encoder_service import metrics
from encoder_service.tile_stream import StreamTimings


def test_stages_are_observed_in_seconds() -> None:
    def read(stage: str) -> float:
        return REGISTRY.get_sample_value("tessera_encoder_stage_seconds_sum", {"stage": stage}) or 0.0

    before = {stage: read(stage) for stage in ("decode", "encode")}
    metrics.observe(StreamTimings(decode_ns=2_000_000_000, encode_ns=500_000_000))
    assert read("decode") - before["decode"] == 2 and read("encode") - before["encode"] == 0.5
