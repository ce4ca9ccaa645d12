"""What the scheduler schedules: one choice of one request, and the group of its siblings."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from llm_service.sampling_params import SamplingParams

TileKey = bytes  # cache salt, content hash and tile number: names the visual tokens of one tile


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class VisualTile:
    """Prompt positions [offset, offset + num_tokens) hold the visual tokens of one tile."""

    key: TileKey
    offset: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.offset + self.num_tokens


@dataclass(frozen=True, order=True)
class QueueRank:
    """Place in the queue: lower priority numbers first, then first come, first served."""

    priority: int
    arrival: int


@dataclass(eq=False)
class SequenceGroup:
    """The `n` choices of one request.  They share the prompt and its visual tokens."""

    group_id: int
    rank: QueueRank
    prompt_token_ids: list[int]
    tiles: tuple[VisualTile, ...]  # by offset
    params: SamplingParams
    stop_token_ids: frozenset[int]  # tokens that end a choice, end of sequence included
    max_tokens: int
    cache_salt: bytes = b""
    takes_turns: bool = False  # its encoders compute on the engine's GPU
    arrival_tokens: int = 0  # visual tokens that come together; 0: nobody knows
    sequences: list[Sequence] = field(default_factory=list)

    def text_token_ids(self) -> list[int]:
        """The prompt without its visual positions."""
        ids, end = [], 0
        for tile in self.tiles:
            ids += self.prompt_token_ids[end : tile.offset]
            end = tile.end
        return ids + self.prompt_token_ids[end:]

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


class Sequence:
    """One choice: prompt and generated tokens, how many of them are in the KV cache, and where."""

    def __init__(self, group: SequenceGroup, index: int) -> None:
        self.group = group
        self.index = index
        # Plain numbers, because every step sorts the queues by it.
        self.rank = (group.rank.priority, group.rank.arrival, index)
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_prompt_tokens = len(group.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + group.max_tokens  # the context may be shorter
        self.token_ids = list(group.prompt_token_ids)
        self.output_token_ids: list[int] = []
        # Tokens that steps under way are sampling; they come behind `token_ids`.
        self.num_pending_tokens = 0
        # Tokens whose keys and values are in the cache, or will be when the steps under way have ended.
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the prompt, read from the prefix cache at first admission
        # Replaced, never changed in place: steps under way hold it without a copy.
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of full blocks of token_ids, as far as they were needed
        self.num_published_blocks = 0  # of the block table, from its start
        self.was_scheduled = False

    @property
    def num_tokens(self) -> int:
        """Known and pending ones."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known and pending ones."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is missing from the cache."""
        return self.num_tokens - self.num_computed_tokens == 1 and self.num_output_tokens > 0

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def tiles_between(self, start: int, end: int) -> list[VisualTile]:
        """Tiles with a position in [start, end)."""
        if not self.group.tiles or start >= self.group.tiles[-1].end:
            return []  # every decode comes here
        return [tile for tile in self.group.tiles if tile.offset < end and tile.end > start]
