"""The metrics pages of all workers on one: every sample with the label of its worker.

Prometheus asks the shared port, where any worker may answer; it asks the others over unix sockets in a folder
that they share.  Sums are the reader's: a label is right for counters, gauges and histograms alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# A worker that is busier than this is missing from the page.
TIMEOUT_S = 1.0


class WorkerPages:
    """One worker's view: its own page and where those of the others are."""

    def __init__(self, folder: Path, index: int, num_workers: int) -> None:
        self._paths = {number: folder / f"metrics-{number}.sock" for number in range(num_workers)}
        self._index = index
        self._server: asyncio.Server | None = None

    async def listen(self, own_page: Callable[[], bytes]) -> None:
        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(own_page())
            writer.close()

        self._server = await asyncio.start_unix_server(answer, self._paths[self._index])

    async def page(self) -> bytes:
        numbers = list(self._paths)
        pages = await asyncio.gather(*(_read(self._paths[number]) for number in numbers))
        return merged({str(number): page for number, page in zip(numbers, pages, strict=True) if page})

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


async def _read(path: Path) -> bytes:
    """Empty when the worker is gone or does not answer."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def merged(pages: Mapping[str, bytes]) -> bytes:
    """One page of the pages by worker."""
    metrics: dict[str, Metric] = {}
    for worker, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            metric = metrics.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            metric.samples += [_labelled(sample, worker) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Fixed(metrics.values()))
    return generate_latest(registry)


def _labelled(sample: Sample, worker: str) -> Sample:
    return sample._replace(labels={**sample.labels, "worker": worker})


class _Fixed(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        return self._metrics
