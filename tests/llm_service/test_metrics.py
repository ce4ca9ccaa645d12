"""Every finished request is counted by what it cost."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from llm_service.generation import GenerationUsage
from llm_service.generation_clock import GenerationTimings
from llm_service.metrics import count_usage


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_tokens_and_stages_are_counted() -> None:
    def read() -> list[float]:
        return [
            value("tessera_llm_prompt_tokens_total", kind="cached"),
            value("tessera_llm_prompt_tokens_total", kind="computed"),
            value("tessera_llm_completion_tokens_total"),
            value("tessera_llm_stage_seconds_sum", stage="prefill"),
        ]

    before = read()
    timings = GenerationTimings(1, 2, 3, 4_000_000_000, 1, 5, 6)
    count_usage(GenerationUsage(100, 64, 30, 7, timings))
    assert [new - old for new, old in zip(read(), before, strict=True)] == pytest.approx([30, 70, 7, 4])
