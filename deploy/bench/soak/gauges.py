"""The gauges that must be back at their level once nobody asks anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

LEVELS = (
    "tessera_gateway_in_flight",
    "tessera_grpc_in_flight",
    "tessera_llm_sequences_running",
    "tessera_llm_sequences_waiting",
    "tessera_llm_kv_cache_usage",
    "tessera_llm_visual_slots_in_use",
    "tessera_llm_rings_mapped",
    "tessera_encoder_tiles_queued",
    "tessera_encoder_streams_open",
    "tessera_encoder_pixel_bytes",
    "tessera_encoder_ring_slots_in_use",
)

Levels = dict[str, float]


class Gauges:
    """Pages of the services by name."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    async def read(self) -> Levels:
        """Levels by service, gauge and label.  Raises httpx.HTTPError."""
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            texts = await asyncio.gather(*(_get(client, url) for url in self._pages.values()))
        return {
            f"{service} {name}": value
            for service, text in zip(self._pages, texts, strict=True)
            for name, value in levels_of(text, LEVELS).items()
        }


async def _get(client: httpx.AsyncClient, url: str) -> str:
    return (await client.get(url)).raise_for_status().text


def levels_of(page: str, names: Sequence[str]) -> Levels:
    """The samples of these gauges; labels follow the name."""
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name in names
    }
