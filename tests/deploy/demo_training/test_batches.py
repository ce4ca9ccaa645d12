"""What the trainer sees is what the samples say: tiles in order, answers as targets, tasks beside them."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from deploy.demo_training.batches import LENGTH_STEP, TASKS, BatchMaker, collate
from deploy.demo_training.conversation import Encoder, Style
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.kinds import KINDS, Kind
from deploy.demo_training.sample import Picture, Sample, Turn
from llm_service.tokenizer import Tokenizer


def red_and_talk() -> list[Sample]:
    picture = Picture(Image.new("RGB", (200, 200), "red"))
    turns = (Turn("color", "What color is it?", "red"), Turn("count", "How many?", "3"))
    return [Sample(turns, (picture,)), Sample((Turn("talk", "Hello", "Hi"),))]


def test_targets_are_the_answers_token_by_token(encoder: Encoder, tokenizer: Tokenizer) -> None:
    batch = collate([encoder.encode(sample, Style()) for sample in red_and_talk()], encoder.context_id)
    assert batch.num_answers == 3 and batch.ids.shape[1] % LENGTH_STEP == 0
    answers = [batch.targets[batch.answers == number].tolist() for number in range(3)]
    assert [tokenizer.decode(ids, False) for ids in answers] == [
        "red<|im_end|>",
        "3<|im_end|>",
        "Hi<|im_end|>",
    ]
    tasks = [TASKS[int(batch.tasks[batch.answers == number][0])] for number in range(3)]
    assert tasks == ["color", "count", "talk"]
    assert torch.equal(batch.ids.flatten()[batch.wanted + 1], batch.targets)


def test_visual_positions_are_the_placeholders_of_rows_with_pictures(encoder: Encoder) -> None:
    batch = collate([encoder.encode(sample, Style()) for sample in red_and_talk()], encoder.context_id)
    assert batch.tiles.shape == (1, 3, 224, 224) and len(batch.visual) == 64
    assert batch.visual.max() < batch.ids.shape[1]
    assert (batch.ids.flatten()[batch.visual] == encoder.context_id).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.num_tiles}-tiles")
def test_every_sample_of_a_kind_has_its_tiles(kind: Kind, encoder: Encoder, fonts: FontShelf) -> None:
    batch = BatchMaker(encoder, fonts, num_tiles=2 * kind.num_tiles).make(
        random.Random(5), kind, progress=1.0
    )
    assert len(batch.tiles) == 2 * kind.num_tiles
    assert len(batch.ids) == 3, "two rows with pictures and one of talk"
    per_row = (batch.ids == encoder.context_id).sum(dim=1).tolist()
    assert per_row == [64 * kind.num_tiles] * 2 + [0]


def test_the_same_seed_gives_the_same_batch(encoder: Encoder, fonts: FontShelf) -> None:
    maker = BatchMaker(encoder, fonts, num_tiles=3)
    first, again, other = (maker.make(random.Random(seed), KINDS[0], 0.5) for seed in (1, 1, 2))
    assert torch.equal(first.tiles, again.tiles) and torch.equal(first.ids, again.ids)
    assert not torch.equal(first.tiles, other.tiles)
