"""Endless micro-batches, made in worker processes; every sample of one has equally many tiles."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from deploy.demo_training.conversation import Encoded, Encoder, Style
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.kinds import Kind, choose_kind
from deploy.demo_training.talk import SYSTEM_MESSAGES, closing_turn, make_talk

TASKS = tuple("read total price color shape count place yes_no describe multi_image motion talk".split())
# Shares of conversations that end in thanks, have a system message, ask before they show.
CLOSED, OWN_SYSTEM, QUESTION_FIRST = 0.05, 0.1, 0.15
LENGTH_STEP = 64  # sequences are padded to a multiple of it


@dataclass(frozen=True)
class Batch:
    """One micro-batch; positions are those of the flattened ids."""

    tiles: torch.Tensor  # [num_tiles, 3, S, S] uint8
    marks: torch.Tensor  # [num_tiles, num_patches] uint8
    ids: torch.Tensor  # [batch, length] int64
    visual: torch.Tensor  # [num_tiles * tokens_per_tile] positions of the visual tokens
    wanted: torch.Tensor  # [num_answer_tokens] positions whose next token is part of an answer
    targets: torch.Tensor  # [num_answer_tokens] that next token
    tasks: torch.Tensor  # [num_answer_tokens] index into TASKS of the answer it is part of
    answers: torch.Tensor  # [num_answer_tokens] number of the answer it is part of
    num_answers: int

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: function(value) for name, value in values.items() if name != "num_answers"
        }
        return replace(self, **tensors)


class BatchMaker:
    """Micro-batches of about `num_tiles` tiles, with `talk_share` as many rows without pictures."""

    def __init__(self, encoder: Encoder, fonts: FontShelf, num_tiles: int, talk_share: float = 0.03) -> None:
        self._encoder = encoder
        self._fonts = fonts
        self._num_tiles = num_tiles
        self._talk_share = talk_share

    def make(self, rng: random.Random, kind: Kind, progress: float) -> Batch:
        num_rows = max(1, self._num_tiles // kind.num_tiles)
        rows = [self._row(rng, kind, progress) for _ in range(num_rows)]
        num_talks = max(1, round(num_rows * self._talk_share))
        rows += [self._encoder.encode(make_talk(rng), _style(rng)) for _ in range(num_talks)]
        return collate(rows, self._encoder.context_id)

    def _row(self, rng: random.Random, kind: Kind, progress: float) -> Encoded:
        """Samples with another number of tiles than the kind's are made again."""
        while True:
            sample = kind.make(rng, self._fonts, progress)
            if rng.random() < CLOSED:
                sample = replace(sample, turns=(*sample.turns, closing_turn(rng)))
            encoded = self._encoder.encode(sample, _style(rng))
            if len(encoded.tiles) == kind.num_tiles:
                return encoded


def collate(rows: Sequence[Encoded], context_id: int) -> Batch:
    """Rows padded at their ends; padding is masked by causality and by never being a target."""
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    wanted: list[int] = []
    tasks: list[int] = []
    answers: list[int] = []
    number = 0
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        for answer in row.answers:
            positions = range(index * length + answer.start - 1, index * length + answer.end - 1)
            wanted += positions
            tasks += [TASKS.index(answer.turn.task)] * len(positions)
            answers += [number] * len(positions)
            number += 1
    flat = ids.flatten()
    places = torch.tensor(wanted)
    return Batch(
        tiles=torch.cat([row.tiles for row in rows if len(row.tiles)]),
        marks=torch.cat([row.marks for row in rows if len(row.marks)]),
        ids=ids,
        visual=(flat == context_id).nonzero().squeeze(1),
        wanted=places,
        targets=flat[places + 1],
        tasks=torch.tensor(tasks),
        answers=torch.tensor(answers),
        num_answers=number,
    )


class Batches(IterableDataset[Batch]):
    """An endless stream; `progress` is shared with the trainer, which moves it from 0 to 1."""

    def __init__(self, maker: BatchMaker, progress: Synchronized[float], seed: int) -> None:
        self._maker = maker
        self._progress = progress
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        rng = random.Random(f"{self._seed}/{worker.id if worker else 0}")
        while True:
            progress = self._progress.value
            yield self._maker.make(rng, choose_kind(rng, progress), progress)


def _style(rng: random.Random) -> Style:
    system = rng.choice(SYSTEM_MESSAGES) if rng.random() < OWN_SYSTEM else None
    return Style(system, question_first=rng.random() < QUESTION_FIRST)
