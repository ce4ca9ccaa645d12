"""What an answer adds to the series; which routes count is in test_probes.py and test_middleware.py."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from gateway.events import Delta, Finished, Restarted, Started, Usage
from gateway.metrics import AnswerTimer, GatewayMetrics

FIRST = "tessera_gateway_time_to_first_token_seconds"
BETWEEN = "tessera_gateway_inter_token_seconds"


def samples(metrics: GatewayMetrics) -> dict[str, float]:
    """Name, with the value of its one label behind it, to value; buckets left out."""
    families = text_string_to_metric_families(metrics.page().decode())
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_the_first_text_of_an_answer_counts_once_whatever_its_choices() -> None:
    metrics = GatewayMetrics()
    timer = AnswerTimer(metrics)
    time.sleep(0.02)
    timer.observe([Started(7), Delta(1, "a", 1), Delta(0, "b", 1), Delta(1, "c", 1), Finished(0, "stop")])
    found = samples(metrics)
    assert found[f"{FIRST}_count"] == 1 and found[f"{FIRST}_sum"] >= 0.02
    assert found[f"{BETWEEN}_count"] == 1, "the first delta of another choice is not a gap"


def test_a_gap_is_shared_by_the_tokens_after_it() -> None:
    sums = []
    for num_tokens in (1, 1000, 0):
        metrics = GatewayMetrics()
        timer = AnswerTimer(metrics)
        timer.observe([Delta(0, "a", 1)])
        time.sleep(0.02)
        timer.observe([Delta(0, "b", num_tokens)])
        sums.append(samples(metrics)[f"{BETWEEN}_sum"])
    assert sums[0] >= 0.02 and sums[1] < 0.01 and sums[2] >= 0.02


def test_tokens_add_up_by_kind_over_answers() -> None:
    metrics = GatewayMetrics()
    for _ in range(2):
        AnswerTimer(metrics).observe([Usage(100, 5, cached_tokens=60, image_tokens=30)])
    found = samples(metrics)
    counts = {kind: found[f"tessera_gateway_tokens_total {kind}"] for kind in ("prompt", "image", "cached")}
    assert counts == {"prompt": 200, "image": 60, "cached": 120}
    assert found["tessera_gateway_tokens_total completion"] == 10


def test_an_answer_that_begins_anew_is_counted() -> None:
    metrics = GatewayMetrics()
    AnswerTimer(metrics).observe([Restarted()])
    AnswerTimer(metrics).observe([Started(7)])
    assert samples(metrics)["tessera_gateway_restarts_total"] == 1


def test_two_gateways_of_one_process_count_apart() -> None:
    one, other = GatewayMetrics(), GatewayMetrics()
    one.disconnects.inc()
    assert samples(one)["tessera_gateway_disconnects_total"] == 1
    assert samples(other)["tessera_gateway_disconnects_total"] == 0
