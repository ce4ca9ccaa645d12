"""The step: schedule, run, sample, postprocess.  Knows neither sockets nor text."""

from __future__ import annotations

import time
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Protocol

import torch

from llm_service.messages import StepInput, TokenOutput, VisualRows
from llm_service.sampler import SampledToken, Sampler, SamplerRow
from llm_service.scheduler import Schedule, Scheduler, TileGrant
from llm_service.sequence import FinishReason, Sequence, SequenceGroup
from llm_service.visual_store import VisualStore


class Runner(Protocol):
    """Sequences as numbers in, logits out: a ModelRunner, or several of them in parallel."""

    def forward(self, step: StepInput) -> torch.Tensor: ...  # [len(logits_positions), vocab_size] float32


@dataclass(frozen=True)
class SequenceProgress:
    """What one step did for one sequence."""

    sequence: Sequence
    tokens: list[TokenOutput]
    scheduled_ns: int


@dataclass(frozen=True)
class StepResult:
    progress: list[SequenceProgress]  # of sequences that got a token
    grants: list[TileGrant]
    has_computed: bool  # False: every sequence waits for tiles


class Engine:
    def __init__(self, scheduler: Scheduler, store: VisualStore, runner: Runner, sampler: Sampler) -> None:
        self.scheduler = scheduler
        self._store = store
        self._runner = runner
        self._sampler = sampler
        self._rows: dict[Sequence, SamplerRow] = {}
        self._scheduled_ns: dict[Sequence, int] = {}

    def add(self, group: SequenceGroup) -> None:
        self.scheduler.add(group)

    def abort(self, group_id: int) -> None:
        """End all choices.  Granted slots stay the front end's until `close`."""
        group = self.scheduler.groups.get(group_id)
        self.scheduler.abort(group_id)
        if group is not None:
            self._forget(group.sequences)

    def close(self, group_id: int) -> None:
        """The front end is done with the group, ended or not, and will write none of its slots."""
        self.abort(group_id)
        self.scheduler.revoke_grants(group_id)

    def abort_choice(self, group_id: int, index: int) -> None:
        """End one choice; its siblings go on.  Unknown ids are ignored: it may just have finished."""
        group = self.scheduler.groups.get(group_id)
        if group is not None:
            self.scheduler.finish(group.sequences[index], FinishReason.ABORT)
            self._forget([group.sequences[index]])

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.groups)

    def step(self) -> StepResult:
        """Compute what can be computed now.  An empty result means that everything waits for tiles."""
        schedule = self.scheduler.schedule()
        if schedule.is_empty:
            return StepResult([], schedule.grants, has_computed=False)
        now = time.monotonic_ns()
        for sequence in schedule.num_new_tokens:
            self._scheduled_ns.setdefault(sequence, now)
        sampled = self._run(schedule)
        tokens = {sequence: token.token_id for sequence, token in sampled.items()}
        finished = self.scheduler.postprocess(schedule, tokens)
        progress = [
            SequenceProgress(sequence, [_token_output(token)], self._scheduled_ns[sequence])
            for sequence, token in sampled.items()
        ]
        self._forget(finished)
        return StepResult(progress, schedule.grants, has_computed=True)

    def _run(self, schedule: Schedule) -> dict[Sequence, SampledToken]:
        logits = self._runner.forward(build_step_input(schedule, self._store))
        sequences = schedule.sampled()
        if not sequences:
            return {}
        rows = [self._row_of(sequence, logits.device) for sequence in sequences]
        return dict(zip(sequences, self._sampler.sample(logits, rows), strict=True))

    def _row_of(self, sequence: Sequence, device: torch.device) -> SamplerRow:
        """Made at the first token and kept through preemption, so that a seed's draws go on."""
        if sequence not in self._rows:
            group = sequence.group
            generator = None
            if group.params.seed is not None:
                generator = torch.Generator(device).manual_seed(group.params.seed + sequence.index)
            self._rows[sequence] = SamplerRow(
                group.params,
                group.text_token_ids() if group.params.repetition_penalty != 1.0 else (),
                sequence.output_token_ids,
                tuple(group.stop_token_ids),
                generator,
            )
        return self._rows[sequence]

    def _forget(self, sequences: List[Sequence]) -> None:
        for sequence in sequences:
            self._rows.pop(sequence, None)
            self._scheduled_ns.pop(sequence, None)


def build_step_input(schedule: Schedule, store: VisualStore) -> StepInput:
    """The numbers of one forward; every visual position in it has its tile in the store."""
    token_ids: list[int] = []
    visual_rows: list[VisualRows] = []
    logits_positions: list[int] = []
    sampled = set(schedule.sampled())
    for sequence, count in schedule.num_new_tokens.items():
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + count
        visual_rows += _visual_rows(sequence, start, end, len(token_ids), store)
        token_ids += sequence.token_ids[start:end]
        if sequence in sampled:
            logits_positions.append(len(token_ids) - 1)
    return StepInput(
        token_ids=token_ids,
        query_lens=list(schedule.num_new_tokens.values()),
        context_lens=[s.num_computed_tokens + count for s, count in schedule.num_new_tokens.items()],
        block_tables=[list(sequence.block_table) for sequence in schedule.num_new_tokens],
        visual_rows=visual_rows,
        logits_positions=logits_positions,
    )


def _visual_rows(
    sequence: Sequence, start: int, end: int, batch_position: int, store: VisualStore
) -> list[VisualRows]:
    rows = []
    for tile in sequence.tiles_between(start, end):
        slot = store.slot_of(tile.key)
        assert slot is not None, "scheduled past a missing visual token"
        first = max(start, tile.offset)
        num_rows = min(end, tile.end) - first
        rows.append(VisualRows(batch_position + first - start, slot, first - tile.offset, num_rows))
    return rows


def _token_output(token: SampledToken) -> TokenOutput:
    return TokenOutput(token.token_id, token.logprob, token.top or [])
