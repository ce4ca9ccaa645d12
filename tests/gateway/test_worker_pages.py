"""Pages of several workers as one."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import GatewayMetrics
from gateway.worker_pages import WorkerPages, merged


def values(page: bytes, name: str) -> dict[str, float]:
    """By worker."""
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name == name
    }


def test_each_sample_says_its_worker_and_keeps_its_labels() -> None:
    pages = {}
    for worker in ("0", "1"):
        metrics = GatewayMetrics()
        metrics.disconnects.inc(1 + int(worker))
        metrics.first_token_s.observe(0.3)
        metrics.requests.labels("/x", "200").inc(5)
        pages[worker] = metrics.page()
    page = merged(pages)
    assert values(page, "tessera_gateway_disconnects_total") == {"0": 1, "1": 2}
    assert values(page, "tessera_gateway_time_to_first_token_seconds_count") == {"0": 1, "1": 1}
    assert b'tessera_gateway_requests_total{route="/x",status="200",worker="1"} 5.0' in page
    for kind in (b"histogram", b"counter"):
        assert page.count(b" " + kind) == pages["0"].count(b" " + kind), "one family each"


async def test_a_worker_that_is_gone_is_missing_from_the_page(tmp_path: Path) -> None:
    metrics = GatewayMetrics()
    metrics.disconnects.inc(3)
    here, gone = WorkerPages(tmp_path, 0, 3), WorkerPages(tmp_path, 1, 3)
    await here.listen(metrics.page)
    await gone.listen(GatewayMetrics().page)
    assert set(values(await here.page(), "tessera_gateway_disconnects_total")) == {"0", "1"}
    gone.close()
    assert values(await here.page(), "tessera_gateway_disconnects_total") == {"0": 3}
    here.close()
