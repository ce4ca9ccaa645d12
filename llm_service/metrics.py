"""Prometheus series of the language model: what an operator scales and alerts on."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from llm_service.encoder_pool import EncoderPool
from llm_service.engine_client import EngineClient
from llm_service.generation import GenerationUsage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

RUNNING = Gauge("tessera_llm_sequences_running", "Sequences in the batch")
WAITING = Gauge("tessera_llm_sequences_waiting", "Sequences in the queue")
KV_USAGE = Gauge("tessera_llm_kv_cache_usage", "Share of the KV blocks in use, 0 to 1")
PREEMPTIONS = Gauge("tessera_llm_preemptions", "Sequences preempted since the engine started")
STORE_HITS = Gauge(
    "tessera_llm_visual_store_hits", "Tiles that requests found in the visual store since the engine started"
)
STORE_GRANTS = Gauge(
    "tessera_llm_visual_store_grants",
    "Tiles asked of encoders since the engine started, again after an eviction",
)
STORE_SLOTS = Gauge("tessera_llm_visual_slots_in_use", "Slots of the visual store that running requests hold")
RINGS = Gauge("tessera_llm_rings_mapped", "Encoders whose tiles come through shared memory")
ENCODERS = Gauge("tessera_llm_encoders_ready", "Encoders that answer and hold the same checkpoint")
PROMPT_TOKENS = Counter("tessera_llm_prompt_tokens_total", "Prompt tokens of finished requests", ["kind"])
COMPLETION_TOKENS = Counter("tessera_llm_completion_tokens_total", "Generated tokens of finished requests")
STAGE_SECONDS = Histogram(
    "tessera_llm_stage_seconds", "Where the time of finished requests went", ["stage"], buckets=SECONDS
)


def watch_load(engine: EngineClient, encoders: EncoderPool) -> None:
    """Let the gauges read the load whenever they are asked."""
    num_blocks = engine.ready.num_blocks
    RUNNING.set_function(lambda: engine.stats.num_running)
    WAITING.set_function(lambda: engine.stats.num_waiting)
    KV_USAGE.set_function(lambda: 1 - engine.stats.num_free_blocks / num_blocks)
    PREEMPTIONS.set_function(lambda: engine.stats.num_preemptions)
    STORE_HITS.set_function(lambda: engine.stats.num_store_hits)
    STORE_GRANTS.set_function(lambda: engine.stats.num_store_grants)
    STORE_SLOTS.set_function(lambda: engine.stats.num_store_slots_in_use)
    RINGS.set_function(lambda: sum(each.ring is not None for each in encoders.connections))
    ENCODERS.set_function(lambda: encoders.num_ready)


def count_usage(usage: GenerationUsage) -> None:
    PROMPT_TOKENS.labels("cached").inc(usage.cached_tokens)
    PROMPT_TOKENS.labels("computed").inc(usage.prompt_tokens - usage.cached_tokens)
    COMPLETION_TOKENS.inc(usage.completion_tokens)
    timings = usage.timings
    for stage in ("layout", "encode", "queue", "prefill", "overlap", "decode", "total"):
        STAGE_SECONDS.labels(stage).observe(getattr(timings, f"{stage}_ns") / 1e9)
