"""The step: schedule, launch, collect.  Knows neither sockets nor text.

Where steps may overlap, the next one is scheduled and launched while one runs, and tokens are read one step
late: a sequence's newest token is then named by its row in the step under way.  Whoever needs the token
itself (penalties, for instance) is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llm_service.grammar import Grammar, GrammarState
from llm_service.messages import StepInput, TokenOutput, VisualRows
from llm_service.sampler_row import SamplerRow
from llm_service.scheduler import Schedule, Scheduler, TileGrant
from llm_service.sequence import FinishReason, Sequence, SequenceGroup, SequenceStatus
from llm_service.step_launcher import PendingStep, StepLauncher
from llm_service.visual_store import VisualStore

# A step of that many tokens takes tens of milliseconds.  A next one scheduled at its start would miss the
# tiles of all that time.  Without pictures it misses new requests only, which would queue behind it anyway
# when it is full, and behind one decode when it is not.
MAX_OVERLAPPED_TOKENS = 1024


@dataclass
class PrefillClock:
    """Nanoseconds of one sequence."""

    scheduled_ns: int  # CLOCK_MONOTONIC of its first step
    overlap_ns: int = 0  # in steps for its prompt that began while visual tokens of it were missing


class SequenceProgress(NamedTuple):
    """What one step did for one sequence."""

    sequence: Sequence
    tokens: list[TokenOutput]
    clock: PrefillClock


@dataclass(frozen=True)
class StepResult:
    progress: list[SequenceProgress]  # of sequences that got a token
    grants: list[TileGrant]
    has_computed: bool  # False: every sequence waits for tiles
    failed: list[int] = field(default_factory=list)  # groups that were aborted: their grammars took too much

    def __add__(self, later: StepResult) -> StepResult:
        computed = self.has_computed or later.has_computed
        failed = self.failed + later.failed
        return StepResult(self.progress + later.progress, self.grants + later.grants, computed, failed)


@dataclass(frozen=True)
class _StepUnderWay:
    pending: PendingStep
    row_of: dict[Sequence, int]  # of the sequences that it samples for, in this order
    slots: frozenset[int]  # of the visual store, which it reads
    early: list[Sequence]  # whose prompts miss visual tokens behind what it computes
    launched_ns: int
    may_overlap: bool  # the next step may be scheduled before this one has ended


class Engine:
    def __init__(
        self, scheduler: Scheduler, store: VisualStore, launcher: StepLauncher, overlap: bool = False
    ) -> None:
        """`overlap`: schedule and launch a step while the one before runs."""
        self.scheduler = scheduler
        self._store = store
        self._launcher = launcher
        self._overlap = overlap
        self._under_way: deque[_StepUnderWay] = deque()
        self._num_left_running = 0  # steps that the next `collect` need not wait for
        self._held_grants: list[TileGrant] = []  # of slots that a step under way still reads
        self._rows: dict[Sequence, SamplerRow] = {}
        self._clocks: dict[Sequence, PrefillClock] = {}

    def add(self, group: SequenceGroup, grammar: Grammar | None = None) -> None:
        """`grammar` rules the text of every choice."""
        self.scheduler.add(group)
        if grammar is not None:
            for sequence in group.sequences:
                self._make_row(sequence, grammar.start())

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
        self._held_grants = [grant for grant in self._held_grants if grant.group_id != group_id]

    def abort_choice(self, group_id: int, index: int) -> None:
        """End one choice; its siblings go on.  Unknown ids are ignored: it may just have finished."""
        group = self.scheduler.groups.get(group_id)
        if group is not None:
            self.scheduler.finish(group.sequences[index], FinishReason.ABORT)
            self._forget([group.sequences[index]])

    def abandon_steps(self) -> None:
        """Forget the steps under way after a failure, when nothing reads or writes for them any more."""
        for step in self._under_way:
            with suppress(Exception):  # what failed has been reported
                step.pending.collect()
        self._under_way.clear()

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.groups or self._under_way)

    @property
    def is_ready(self) -> bool:
        """Whether `collect` would return at once."""
        return not self._is_due or self._under_way[0].pending.is_ready()

    @property
    def _is_due(self) -> bool:
        return len(self._under_way) > self._num_left_running

    def step(self) -> StepResult:
        """Launch what can be computed now, collect what is due.

        Without overlap that is one step.  A result without progress or computation means that everything
        waits for tiles.
        """
        launched = self.launch()
        return launched + self.collect()

    def launch(self) -> StepResult:
        """Schedule the next step and launch it, unless it has to wait for the one under way.

        `collect` must follow, after any other calls.
        """
        self._num_left_running = 0
        if self._under_way and not self._under_way[-1].may_overlap:
            return StepResult([], [], has_computed=False)
        schedule = self.scheduler.schedule()
        self._held_grants += schedule.grants
        if not schedule.is_empty:
            self._under_way.append(self._launch(schedule))
            self._num_left_running = int(self._under_way[-1].may_overlap)
        return StepResult([], self._release_grants(), has_computed=not schedule.is_empty)

    def collect(self) -> StepResult:
        """Wait for the oldest step under way and read its tokens, unless it may go on running."""
        if not self._is_due:
            return StepResult([], [], has_computed=False)
        step = self._under_way.popleft()
        samples = step.pending.collect()
        self._note_overlap(step)
        failed = self._abort_failed(step.row_of)
        # Those that ended while it ran have no use for another token.
        progress = [
            SequenceProgress(sequence, [token], self._clocks[sequence])
            for sequence, token in zip(step.row_of, samples, strict=True)
            if sequence.status is not SequenceStatus.FINISHED
        ]
        finished = self.scheduler.append((sequence, tokens[0].token_id) for sequence, tokens, _ in progress)
        self._forget(finished)
        for sequence, tokens, _ in progress:
            row = self._rows.get(sequence)
            if row is not None and row.grammar is not None:
                row.grammar.accept(tokens[0].token_id)
        return StepResult(progress, self._release_grants(), has_computed=True, failed=failed)

    def _abort_failed(self, sampled: Iterable[Sequence]) -> list[int]:
        """End the groups whose grammars gave up: what was sampled for them means nothing."""
        failed = []
        for sequence in sampled:
            row = self._rows.get(sequence)
            if row is not None and row.grammar is not None and row.grammar.has_failed:
                failed.append(sequence.group.group_id)
                self.abort(sequence.group.group_id)
        return failed

    def _launch(self, schedule: Schedule) -> _StepUnderWay:
        now = time.monotonic_ns()
        for sequence in schedule.num_new_tokens.keys() - self._clocks.keys():
            self._clocks[sequence] = PrefillClock(now)
        row_of = self._under_way[-1].row_of if self._under_way else {}
        step = build_step_input(schedule, self._store, row_of)
        sampled = self.scheduler.advance(schedule)
        rows = [self._rows.get(sequence) or self._make_row(sequence) for sequence in sampled]
        # A prompt that ends at a missing tile goes on with all that come while this runs, not with the first.
        is_cut = len(sampled) < len(schedule.num_new_tokens)
        is_short = schedule.num_tokens < MAX_OVERLAPPED_TOKENS and not is_cut
        timely = is_short or not self.scheduler.has_pictures
        waited_for = any(row.alters_logits and row.needs_output for row in rows)
        may_overlap = self._overlap and timely and not waited_for
        return _StepUnderWay(
            pending=self._launcher.launch(step, rows),
            row_of={sequence: row for row, sequence in enumerate(sampled)},
            slots=frozenset(visual.slot for visual in step.visual_rows),
            early=[sequence for sequence in schedule.num_new_tokens if self.scheduler.misses_tiles(sequence)]
            if is_cut
            else [],
            launched_ns=now,
            may_overlap=may_overlap,
        )

    def _note_overlap(self, step: _StepUnderWay) -> None:
        for sequence in step.early:
            if sequence in self._clocks:  # else it has ended
                self._clocks[sequence].overlap_ns += time.monotonic_ns() - step.launched_ns

    def _release_grants(self) -> list[TileGrant]:
        """Grants of slots that nobody reads: a front end may write them at once."""
        if not self._held_grants:
            return []
        reading = frozenset[int]().union(*(step.slots for step in self._under_way))
        held, self._held_grants = self._held_grants, []
        self._held_grants += [grant for grant in held if grant.slot in reading]
        return [grant for grant in held if grant.slot not in reading]

    def _make_row(self, sequence: Sequence, grammar: GrammarState | None = None) -> SamplerRow:
        """Made at the first token and kept through preemption, so that a seed's draws go on."""
        group = sequence.group
        generator = None
        if group.params.seed is not None:
            generator = torch.Generator(self._launcher.device)
            generator.manual_seed(group.params.seed + sequence.index)
        row = self._rows[sequence] = SamplerRow(
            group.params,
            group.text_token_ids() if group.params.repetition_penalty != 1.0 else (),
            sequence.output_token_ids,
            tuple(group.stop_token_ids),
            generator,
            grammar,
        )
        return row

    def _forget(self, sequences: List[Sequence]) -> None:
        for sequence in sequences:
            self._rows.pop(sequence, None)
            self._clocks.pop(sequence, None)


def build_step_input(
    schedule: Schedule, store: VisualStore, row_of: Mapping[Sequence, int] | None = None
) -> StepInput:
    """The numbers of one forward; every visual position in it has its tile in the store.

    `row_of` tells where the step under way samples a sequence's pending token.
    """
    token_ids: list[int] = []
    context_lens: list[int] = []
    visual_rows: list[VisualRows] = []
    logits_positions: list[int] = []
    for sequence, count in schedule.num_new_tokens.items():
        known, start = sequence.token_ids, sequence.num_computed_tokens
        end = start + count
        if sequence.group.tiles:
            visual_rows += _visual_rows(sequence, start, end, len(token_ids), store)
        if end > len(known):
            assert row_of is not None and end == len(known) + 1
            token_ids += known[start:]
            token_ids.append(-1 - row_of[sequence])
        else:
            token_ids += known[start:end]
        context_lens.append(end)
        if end == len(known) + sequence.num_pending_tokens:
            logits_positions.append(len(token_ids) - 1)
    return StepInput(
        token_ids=token_ids,
        query_lens=list(schedule.num_new_tokens.values()),
        context_lens=context_lens,
        block_tables=[sequence.block_table for sequence in schedule.num_new_tokens],
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
