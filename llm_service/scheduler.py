"""Which tokens of which sequences the next step computes, and which tiles may come in.

One token budget a step is shared by decodes and prefill chunks.  Blocks are taken per scheduled chunk;
when they run out, younger sequences give theirs up and are recomputed later.  A sequence runs up to
its first visual token that has not arrived, and no further.  Knows neither tensors nor IO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from llm_service.block_manager import BlockManager
from llm_service.sequence import (
    FinishReason,
    Sequence,
    SequenceGroup,
    SequenceStatus,
    TileKey,
    VisualTile,
)
from llm_service.visual_store import VisualStore

READ_BY_ALL = (math.inf, 0)  # needed later than anything
# An efficient step of a GPU: a 7B model's first token behind 10 tiles took 84 ms, in steps from 256 on 91.
MANY_TOKENS = 1024


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int  # most sequences computed in one step; those that wait for tiles do not count
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0  # most prompt tokens of one sequence in a step; 0: no limit
    enable_encoding_overlap: bool = True  # False: a prompt is begun when all its tiles are there
    overlap_on_shared_gpu: bool = False  # also for requests whose encoders compute on the engine's GPU
    # Fewest prompt tokens worth a step while a tile behind them is on its way; 0: those that come together.
    min_overlap_tokens: int = 1


@dataclass(frozen=True)
class TileGrant:
    """The front end of the group may write the tile into the slot."""

    group_id: int
    tile_index: int  # index into SequenceGroup.tiles
    slot: int


@dataclass
class Schedule:
    """One step: how many new tokens of each sequence are computed."""

    num_new_tokens: dict[Sequence, int] = field(default_factory=dict)
    num_tokens: int = 0  # sum over sequences
    grants: list[TileGrant] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.num_new_tokens

    def add(self, sequence: Sequence, count: int) -> None:
        self.num_new_tokens[sequence] = count
        self.num_tokens += count

    def discard(self, sequence: Sequence) -> None:
        self.num_tokens -= self.num_new_tokens.pop(sequence, 0)


class Scheduler:
    def __init__(self, config: SchedulerConfig, blocks: BlockManager, store: VisualStore) -> None:
        self._config = config
        self._blocks = blocks
        self._store = store
        self.groups: dict[int, SequenceGroup] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, group: SequenceGroup) -> None:
        """The caller has checked that prompt and max_tokens fit into max_model_len."""
        group.sequences = [Sequence(group, index) for index in range(group.params.n)]
        for sequence in group.sequences:
            sequence.max_num_tokens = min(sequence.max_num_tokens, self._config.max_model_len)
        self.groups[group.group_id] = group
        self.waiting.extend(group.sequences)

    def abort(self, group_id: int) -> None:
        """End the group's choices; unknown ids are ignored (it may just have finished)."""
        group = self.groups.get(group_id)
        if group is None:
            return
        for sequence in group.sequences:
            self.finish(sequence, FinishReason.ABORT)

    def revoke_grants(self, group_id: int) -> None:
        """The front end of a group, ended or not, will write no granted slot any more."""
        self._store.revoke(group_id)

    def tile_stored(self, group_id: int, tile_index: int) -> None:
        """The front end has written a granted slot; unknown ids are ignored, as in `abort`."""
        if group_id in self.groups:
            self._store.store(self.groups[group_id].tiles[tile_index].key, group_id)

    def schedule(self) -> Schedule:
        # First, while nothing is being read yet: the oldest can then take any slot that is not its own.
        schedule = Schedule(grants=list(self._grant_tiles()))
        budget = self._config.max_num_batched_tokens
        self.running.sort(key=attrgetter("rank"))
        for sequence in self._schedule_decodes(schedule, budget):
            if sequence.status is SequenceStatus.RUNNING:  # an older one may have preempted it meanwhile
                self._schedule_running(sequence, schedule, budget)
        self._admit(schedule, budget)
        return schedule

    def advance(self, schedule: Schedule) -> list[Sequence]:
        """The step is about to run: its tokens count as computed, those that it samples are pending.

        Returns the sequences that it samples for, in batch order.  A next step may be scheduled before
        `append`; more than one step ahead it may not.
        """
        sampled = []
        block_size = self._blocks.block_size
        for sequence, count in schedule.num_new_tokens.items():
            sequence.num_computed_tokens = computed = sequence.num_computed_tokens + count
            if count > 1 or computed % block_size == 0:  # else no block has become full
                self._blocks.publish(sequence)
            if computed == len(sequence.token_ids) + sequence.num_pending_tokens:
                sequence.num_pending_tokens += 1
                sampled.append(sequence)
        return sampled

    def append(self, sampled: Iterable[tuple[Sequence, int]]) -> list[Sequence]:
        """A step has ended: its pending tokens are known; returns the sequences that finished with theirs.

        None of them has ended before.
        """
        finished = []
        block_size = self._blocks.block_size
        for sequence, token_id in sampled:
            sequence.num_pending_tokens -= 1
            sequence.append(token_id)
            num_known = len(sequence.token_ids)
            if num_known % block_size == 0:  # else no block has become full
                self._blocks.publish(sequence)
            if num_known < sequence.max_num_tokens and token_id not in sequence.group.stop_token_ids:
                continue
            reason = _finish_reason(sequence, token_id)
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Free what the sequence holds; with a group's last one its visual tokens become cache."""
        if sequence.is_finished:
            return
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(sequence)
        self._blocks.free(sequence)
        sequence.num_pending_tokens = 0
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if sequence.group.is_finished:
            self._store.leave(sequence.group.group_id)
            del self.groups[sequence.group.group_id]

    @property
    def has_pictures(self) -> bool:
        return any(sequence.group.tiles for sequence in chain(self.running, self.waiting))

    def misses_tiles(self, sequence: Sequence) -> bool:
        """Whether visual tokens of what is left of its prompt have not arrived."""
        return self._first_missing(sequence, sequence.num_computed_tokens, None) is not None

    @property
    def num_store_hits(self) -> int:
        """Tiles that requests found in the visual store."""
        return self._store.num_hits

    @property
    def num_store_grants(self) -> int:
        """Tiles that had to be fetched from an encoder."""
        return self._store.num_grants

    @property
    def num_store_slots_in_use(self) -> int:
        """Slots that are granted or that a living group needs."""
        return self._store.num_in_use

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free_blocks

    def reset_prefix_cache(self) -> None:
        self._blocks.reset_prefix_cache()

    def check(self) -> None:
        """Assert that blocks and slots are whole; cheap enough for every step of a test."""
        self._blocks.check(self.running)
        assert not any(sequence.block_table for sequence in self.waiting)
        self._store.check(set(self.groups))

    def _schedule_decodes(self, schedule: Schedule, budget: int) -> list[Sequence]:
        """Schedule what decodes; returns the others.

        Runs for every sequence in every step, so what `_schedule_running` would find out is read off here
        for those that have room in their last block: nothing of a decode waits for tiles.
        """
        others = []
        most = min(budget, self._config.max_num_seqs)
        block_size = self._blocks.block_size
        for sequence in list(self.running):
            computed = sequence.num_computed_tokens
            num_tokens = len(sequence.token_ids) + sequence.num_pending_tokens
            if num_tokens != computed + 1 or num_tokens <= sequence.num_prompt_tokens:
                others.append(sequence)
            elif computed >= len(sequence.block_table) * block_size or schedule.num_tokens >= most:
                self._schedule_running(sequence, schedule, budget)
            elif not sequence.num_pending_tokens or num_tokens < sequence.max_num_tokens:
                schedule.num_new_tokens[sequence] = 1
                schedule.num_tokens += 1
        return others

    def _schedule_running(self, sequence: Sequence, schedule: Schedule, budget: int) -> None:
        if _will_end(sequence):
            return
        count = self._chunk(sequence, budget - schedule.num_tokens)
        if count == 0 or self._is_full(schedule):
            return
        while not self._blocks.allocate(sequence, sequence.num_computed_tokens + count):
            victim = self._victim(sequence)
            if victim is None:
                return  # it keeps its blocks until it gets more, or an older one takes them
            self._preempt(victim, schedule)
        schedule.add(sequence, count)

    def _admit(self, schedule: Schedule, budget: int) -> None:
        self.waiting.sort(key=attrgetter("rank"))
        for sequence in list(self.waiting):
            left = budget - schedule.num_tokens
            if left <= 0 or self._is_full(schedule):
                return
            if self._waits_for_sibling(sequence) or _will_end(sequence):
                continue
            if not self._admit_one(sequence, schedule, left):
                return

    def _admit_one(self, sequence: Sequence, schedule: Schedule, left: int) -> bool:
        """False when blocks are short: those behind must not overtake."""
        sequence.num_computed_tokens = self._blocks.attach_cached_prefix(sequence)
        count = self._chunk(sequence, left)
        if count and self._allocate_from_idle(sequence, sequence.num_computed_tokens + count, schedule):
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            if not sequence.was_scheduled:
                sequence.was_scheduled = True
                sequence.num_cached_tokens = sequence.num_computed_tokens
            schedule.add(sequence, count)
            return True
        self._blocks.free(sequence)
        sequence.num_computed_tokens = 0
        return count == 0  # it waits for a tile: let others run

    def _allocate_from_idle(self, sequence: Sequence, num_tokens: int, schedule: Schedule) -> bool:
        """Allocate, if need be from younger sequences that this step does not compute.

        Without this, one that waits for blocks and one that waits for the slots of its tiles could hold
        what the other needs.
        """
        while not self._blocks.allocate(sequence, num_tokens):
            idle = [
                other
                for other in self.running
                if other.rank > sequence.rank and other not in schedule.num_new_tokens
            ]
            if not idle:
                return False
            self._preempt(max(idle, key=lambda other: other.rank), schedule)
        return True

    def _is_full(self, schedule: Schedule) -> bool:
        return len(schedule.num_new_tokens) >= self._config.max_num_seqs

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """One choice computes the prompt; the others read it from the prefix cache."""
        siblings = sequence.group.sequences
        if not self._blocks.enable_prefix_caching or any(sibling.num_output_tokens for sibling in siblings):
            return False
        return sequence is not next(sibling for sibling in siblings if not sibling.is_finished)

    def _chunk(self, sequence: Sequence, left: int) -> int:
        """New tokens to compute: up to the budget, the chunk limit and the first missing visual token."""
        config = self._config
        start = sequence.num_computed_tokens
        end = sequence.num_tokens
        if not sequence.is_decoding and config.long_prefill_token_threshold:
            end = min(end, start + config.long_prefill_token_threshold)
        end = min(end, start + left)
        overlaps = self._overlaps(sequence)
        missing = self._first_missing(sequence, start, end if overlaps else None)
        if missing is None:
            return max(end - start, 0)
        count = max(min(end, missing.offset) - start, 0)
        # Waiting is only safe for a tile that has a slot: others may need what this one holds.
        is_coming = self._store.is_granted(missing.key)
        return 0 if is_coming and count < (self._fewest(sequence) if overlaps else math.inf) else count

    def _fewest(self, sequence: Sequence) -> int:
        """Tokens worth a step before a tile that is on its way.

        Small steps are slow, and nothing is gained by them where the next tiles are about to come; where a
        tower sends each tile alone they keep up with it.
        """
        together = sequence.group.arrival_tokens or MANY_TOKENS
        return self._config.min_overlap_tokens or min(together, MANY_TOKENS)

    def _overlaps(self, sequence: Sequence) -> bool:
        """Whether it is worth a step to compute what is before a tile that is on its way."""
        config = self._config
        return config.enable_encoding_overlap and (
            config.overlap_on_shared_gpu or not sequence.group.takes_turns
        )

    def _first_missing(self, sequence: Sequence, start: int, end: int | None) -> VisualTile | None:
        """First tile between the two positions, or behind the first, that is not in the store."""
        tiles = sequence.tiles_between(start, sequence.num_tokens if end is None else end)
        return next((tile for tile in tiles if self._store.slot_of(tile.key) is None), None)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The youngest sequence behind this one, text-only ones first."""
        younger = [other for other in self.running if other.rank > sequence.rank]
        text_only = [other for other in younger if not other.group.tiles]
        return max(text_only or younger, key=lambda other: other.rank, default=None)

    def _preempt(self, victim: Sequence, schedule: Schedule) -> None:
        schedule.discard(victim)
        self._blocks.free(victim)
        victim.num_computed_tokens = 0
        victim.status = SequenceStatus.WAITING
        self.running.remove(victim)
        self.waiting.append(victim)
        self.num_preemptions += 1

    def _grant_tiles(self) -> Iterator[TileGrant]:
        """Grants follow the queue: the oldest sequence that misses a tile can always obtain a slot."""
        for sequence in self._readers():
            group_id = sequence.group.group_id
            for tile_index, tile in self._unread_tiles(sequence):
                if self._store.join(tile.key, group_id):
                    continue
                slot = self._store.grant(tile.key, group_id)
                if slot is None and self._make_room(sequence, tile):
                    slot = self._store.grant(tile.key, group_id)
                if slot is None:
                    return
                yield TileGrant(group_id, tile_index, slot)

    def _readers(self) -> list[Sequence]:
        """Sequences with pictures, oldest first."""
        pictured = [sequence for sequence in self.running + self.waiting if sequence.group.tiles]
        return sorted(pictured, key=lambda sequence: sequence.rank)

    def _unread_tiles(self, sequence: Sequence) -> Iterator[tuple[int, VisualTile]]:
        tiles = sequence.group.tiles
        start = self._num_tokens_read(sequence)
        return ((index, tile) for index, tile in enumerate(tiles) if tile.end > start)

    def _num_tokens_read(self, sequence: Sequence) -> int:
        """A waiting sequence counts what the prefix cache holds for it."""
        if sequence.status is SequenceStatus.RUNNING:
            return sequence.num_computed_tokens
        return self._blocks.num_cached_tokens(sequence)

    def _make_room(self, sequence: Sequence, missing: VisualTile) -> bool:
        """Evict a tile that all have read, else the one that is needed last, if later than `missing`.

        It is granted again in its turn.
        """
        readers = self._readers()
        needs: dict[TileKey, tuple[float, int]] = {}  # place of the first reader in the queue, and offset
        for place, reader in enumerate(readers):
            for _, tile in self._unread_tiles(reader):
                needs.setdefault(tile.key, (place, tile.offset))
        own_need = (readers.index(sequence), missing.offset)

        def penalty(key: TileKey) -> tuple[float, int] | None:
            need = needs.get(key, READ_BY_ALL)
            return need if need > own_need else None

        return self._store.evict_least_needed(penalty)


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    group = sequence.group
    if token_id in group.stop_token_ids and len(sequence.output_token_ids) > group.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.max_num_tokens else None


def _will_end(sequence: Sequence) -> bool:
    """Its pending token is its last, whatever that turns out to be."""
    return sequence.num_pending_tokens > 0 and sequence.num_tokens >= sequence.max_num_tokens
