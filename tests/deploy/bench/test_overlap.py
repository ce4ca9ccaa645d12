"""Overlap on and off are asked in turns, and compared with what perfect overlap would reach."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deploy.bench import overlap
from deploy.bench.overlap import Asked, Case, Places


def asked(first_token: float, overlap_ms: float = 0.0, tiles: int = 4) -> Asked:
    return Asked(first_token, layout=10, prefill=80, overlap=overlap_ms, visual_tokens=tiles * 256)


def test_the_bound_is_the_longer_stage_and_one_tile_of_the_shorter() -> None:
    off = [asked(130), asked(500), asked(129)]
    row = overlap.compare("a picture", off, [asked(104, 35), asked(104, 35)], tokens_per_tile=256)
    assert (row.num_tiles, row.off, row.on, row.ratio) == (4, 130, 104, 0.8)
    assert (row.encode, row.prefill, row.saved) == (40, 80, 35)
    assert row.bound == 10 + 80 + 40 / 4


def test_text_has_nothing_to_overlap() -> None:
    row = overlap.compare("text", [asked(90, tiles=0)], [asked(91, tiles=0)], tokens_per_tile=256)
    assert row.bound == row.off == 90 and row.num_tiles == 0
    assert "| text | 0 | 90.0 | 91.0 | 1.01 |" in overlap.table([row])


def test_gpus_by_number_or_a_core_each() -> None:
    on_one = overlap.places("0", "")
    assert on_one.encoder == on_one.llm == ("env", "CUDA_VISIBLE_DEVICES=0")
    assert overlap.places("0", "1").llm == ("env", "CUDA_VISIBLE_DEVICES=1")
    on_cores = overlap.places("", "")
    assert on_cores.encoder != on_cores.llm and "taskset" in on_cores.llm


def test_real_services_are_compared(checkpoint: Path) -> None:
    on_cpu = ("--device=cpu", "--num-threads=1")
    cases = [Case("text", 0, (0, 0)), Case("a picture", 1, (1344, 896))]
    text, picture = asyncio.run(overlap.run(checkpoint, Places((), (), on_cpu, on_cpu), cases, rounds=1))
    assert text.num_tiles == 0 and text.on > 0 and text.saved == 0
    assert picture.num_tiles > 1 and picture.off > picture.prefill > 0
    assert picture.bound <= picture.off
