"""The mixture: easy first, hard later, sizes as said."""

from __future__ import annotations

import random

import pytest

from deploy.demo_training.kinds import EASY_UNTIL, HARDEST_FROM, KINDS, Form, choose_kind, level


def test_the_training_begins_with_single_tiles_and_then_mixes_all_kinds() -> None:
    rng = random.Random(0)
    assert {choose_kind(rng, EASY_UNTIL / 2).num_tiles for _ in range(50)} == {1}
    assert {choose_kind(rng, 0.5).num_tiles for _ in range(2000)} == {kind.num_tiles for kind in KINDS}


def test_difficulty_rises_to_its_end() -> None:
    rng = random.Random(0)
    highest = [max(level(rng, progress) for _ in range(500)) for progress in (0, HARDEST_FROM / 2, 1)]
    assert highest == pytest.approx([0.1, 0.55, 1.0], abs=0.01)


def test_forms_keep_their_ranges_and_stand_upright_now_and_then() -> None:
    rng, form = random.Random(0), Form(1.8, 2.4, 300, 600)
    sizes = [form.size(rng) for _ in range(300)]
    assert all(300 <= max(size) <= 600 and 1.79 <= max(size) / min(size) <= 2.42 for size in sizes)
    upright = sum(height > width for width, height in sizes)
    assert 80 < upright < 160
    assert all(width > height for width, height in (form.size(rng, portrait=False) for _ in range(50)))
