"""Small stand-ins for the model and for front ends, so that the engine's logic can be told as stories."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from llm_service.block_manager import BlockManager
from llm_service.engine import Engine
from llm_service.engine_client import EngineClient, EngineRequest, PromptInput
from llm_service.engine_host import EngineHost
from llm_service.grammar import Grammar
from llm_service.grammar_compiler import GrammarCompiler
from llm_service.messages import EngineReady, PromptTile, SequenceOutput, SlotGrant, StepInput
from llm_service.sampled_tokens import SampledToken
from llm_service.sampler import Sampler
from llm_service.sampler_row import SamplerRow
from llm_service.sampling_params import SamplingParams
from llm_service.scheduler import Scheduler, SchedulerConfig, TileGrant
from llm_service.sequence import FinishReason, QueueRank, Sequence, SequenceGroup, VisualTile
from llm_service.step_launcher import PendingStep, StepLauncher, SynchronousLauncher
from llm_service.visual_memory import VisualMemory
from llm_service.visual_store import VisualStore

PLACEHOLDER = 1
VOCAB_SIZE = 64
SLOT_TOKENS = 8
UNWRITTEN = -1
MASK = (1 << 60) - 1


def tile_rows(key: bytes, num_tokens: int) -> torch.Tensor:
    """What the encoder makes of a tile: [num_tokens, 1] int64, no two tiles alike."""
    base = int.from_bytes(hashlib.sha256(key).digest()[:6], "little")
    return (base + torch.arange(num_tokens)).unsqueeze(1)


class FakeRunner:
    """A model whose next token depends on every token and every visual row before it, through the cache.

    A cached value is a hash of its input and of its predecessor in the cache, as a real layer's is; logits
    hash all cached values of the sequence.  Reading what was never written fails.
    """

    def __init__(self, memory: VisualMemory, block_size: int) -> None:
        self.steps: list[StepInput] = []
        self.num_failures = 0  # of the next steps
        self._memory = memory
        self._block_size = block_size
        self._cache: dict[int, int] = {}

    def forward(self, step: StepInput) -> torch.Tensor:
        self.steps.append(step)
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("no kernel")
        inputs = self._inputs(step)
        logits: dict[int, torch.Tensor] = {}
        first = 0
        lens = zip(step.query_lens, step.context_lens, step.block_tables, strict=True)
        for query, context, table in lens:
            slots = [
                table[position // self._block_size] * self._block_size + position % self._block_size
                for position in range(context)
            ]
            for place, position in enumerate(range(context - query, context)):
                before = self._cache[slots[position - 1]] if position else 0
                self._cache[slots[position]] = hash((before, inputs[first + place], position)) & MASK
            first += query
            if first - 1 in step.logits_positions:
                state = hash(tuple(self._cache[slot] for slot in slots)) & MASK
                logits[first - 1] = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(state))
                logits[first - 1][PLACEHOLDER] = -torch.inf
        assert first == len(step.token_ids) and sorted(logits) == sorted(step.logits_positions)
        rows = [logits[position] for position in step.logits_positions]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def _inputs(self, step: StepInput) -> list[int]:
        inputs = [-1 if token_id == PLACEHOLDER else token_id for token_id in step.token_ids]
        for rows in step.visual_rows:
            values = self._memory.rows(rows.slot, rows.first_row, rows.num_rows).flatten().tolist()
            assert UNWRITTEN not in values, "a visual row was read before it was written"
            for place, value in enumerate(values, rows.position):
                assert inputs[place] == -1, "a visual row overwrites text"
                inputs[place] = 1000 + value
        assert -1 not in inputs, "a placeholder got no visual row"
        return inputs


class LateStep:
    """Runs when it is waited for, after all that were launched before it."""

    def __init__(self, launcher: LateLauncher, step: StepInput, rows: list[SamplerRow]) -> None:
        self._launcher, self._step, self._rows = launcher, step, rows
        self._done: PendingStep | None = None

    def is_ready(self) -> bool:
        self._launcher.num_looks += 1
        return self._done is not None or self._launcher.num_looks % 3 == 0

    def run(self) -> None:
        self._done = self._launcher.launcher.launch(self._step, self._rows)

    def collect(self) -> list[SampledToken]:
        while self._done is None:
            self._launcher.under_way.popleft().run()
        return self._done.collect()


class LateLauncher:
    """A device at its slowest: what a step reads and writes, it reads and writes at the last moment."""

    def __init__(self, launcher: SynchronousLauncher) -> None:
        self.device = launcher.device
        self.launcher = launcher
        self.under_way: deque[LateStep] = deque()
        self.num_looks = 0
        self.most_under_way = 0

    def launch(self, step: StepInput, rows: list[SamplerRow]) -> LateStep:
        self.under_way.append(LateStep(self, step, rows))
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return self.under_way[-1]


@dataclass(frozen=True)
class Tile:
    """Part of a test prompt: the visual tokens of one tile."""

    name: str
    num_tokens: int = 4


Parts = list[int | Tile]  # an int is that many text tokens


def num_granted(store: VisualStore) -> int:
    """Slots that a front end may be writing."""
    return sum(not entry.is_stored for entry in store._entries.values())


@dataclass(eq=False)
class World:
    """An engine with the fake model, and front ends that deliver a tile when the test says so."""

    num_blocks: int = 64
    block_size: int = 4
    num_slots: int = 16
    max_num_seqs: int = 16
    budget: int = 64
    max_model_len: int = 0
    threshold: int = 0
    prefix_caching: bool = True
    overlap: bool = False  # of steps
    encoding_overlap: bool = True
    min_overlap_tokens: int = 1
    overlap_on_shared_gpu: bool = False
    groups: dict[int, SequenceGroup] = field(default_factory=dict)
    grants: list[TileGrant] = field(default_factory=list)  # not yet delivered

    def __post_init__(self) -> None:
        self.store = VisualStore(self.num_slots)
        self.blocks = BlockManager(self.num_blocks, self.block_size, self.prefix_caching)
        config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_model_len or self.num_blocks * self.block_size,
            long_prefill_token_threshold=self.threshold,
            enable_encoding_overlap=self.encoding_overlap,
            min_overlap_tokens=self.min_overlap_tokens,
            overlap_on_shared_gpu=self.overlap_on_shared_gpu,
        )
        self.scheduler = Scheduler(config, self.blocks, self.store)
        self.memory = self.make_memory()
        weakref.finalize(self, self.memory.close)
        self.engine = Engine(self.scheduler, self.store, self.make_launcher(), self.overlap)
        self.granted: list[tuple[int, int]] = []  # (group, tile index) ever granted, in order

    def make_memory(self) -> VisualMemory:
        return VisualMemory.create(self.num_slots, SLOT_TOKENS, 1, torch.int64)

    def make_launcher(self) -> StepLauncher:
        self.runner = FakeRunner(self.memory, self.block_size)
        launcher = SynchronousLauncher(self.runner, Sampler(seed=0), torch.device("cpu"))
        self.late_launcher = LateLauncher(launcher)
        return self.late_launcher if self.overlap else launcher

    def tile_rows(self, key: bytes, num_tokens: int) -> torch.Tensor:
        return tile_rows(key, num_tokens)

    def add(
        self,
        parts: Parts,
        max_tokens: int = 4,
        *,
        n: int = 1,
        seed: int | None = None,
        priority: int = 0,
        salt: bytes = b"",
        stops: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        presence_penalty: float = 0.0,
        takes_turns: bool = False,
        arrival_tokens: int = 0,
        grammar: Grammar | None = None,
    ) -> SequenceGroup:
        group_id = len(self.groups)
        temperature = 0.0 if seed is None else 1.0
        params = SamplingParams(
            n=n, seed=seed, temperature=temperature, min_tokens=min_tokens, presence_penalty=presence_penalty
        )
        token_ids, tiles = layout(parts)
        rank = QueueRank(priority, group_id)
        group = SequenceGroup(group_id, rank, token_ids, tiles, params, stops, max_tokens, salt, takes_turns)
        group.arrival_tokens = arrival_tokens
        self.groups[group_id] = group
        self.engine.add(group, grammar)
        return group

    def step(self, deliver: bool = False) -> dict[Sequence, int]:
        """One engine step; returns how many tokens each sequence had computed in it.

        Not to be trusted for those that come back from a preemption, for they may read the prefix cache.
        """
        sequences = [sequence for group in self.groups.values() for sequence in group.sequences]
        before = {s: s.num_computed_tokens for s in sequences}
        unseen = {s for s in sequences if not s.was_scheduled}
        self._spoil_granted(self.engine.launch().grants)
        self.scheduler.check()
        self._spoil_granted(self.engine.collect().grants)
        self.scheduler.check()
        if deliver:
            self.deliver_all()
        return {
            s: s.num_computed_tokens - start - (s.num_cached_tokens if s in unseen else 0)
            for s, start in before.items()
            if s.num_computed_tokens > start
        }

    def _spoil_granted(self, grants: list[TileGrant]) -> None:
        for grant in grants:
            self.memory.write(grant.slot, torch.full_like(self.tile_rows(b"", SLOT_TOKENS), UNWRITTEN))
            self.granted.append((grant.group_id, grant.tile_index))
        self.grants += grants

    def deliver(self, grant: TileGrant) -> None:
        self.grants.remove(grant)
        tile = self.groups[grant.group_id].tiles[grant.tile_index]
        self.memory.write(grant.slot, self.tile_rows(tile.key, tile.num_tokens))
        self.scheduler.tile_stored(grant.group_id, grant.tile_index)
        self.scheduler.check()

    def deliver_all(self) -> None:
        for grant in list(self.grants):
            self.deliver(grant)

    def deliver_tile(self, group: SequenceGroup, tile_index: int) -> None:
        self.deliver(
            next(g for g in self.grants if (g.group_id, g.tile_index) == (group.group_id, tile_index))
        )

    def close(self, group: SequenceGroup) -> None:
        """The front end forgets the request, whatever its state: it writes no slot any more."""
        self.grants = [grant for grant in self.grants if grant.group_id != group.group_id]
        self.engine.close(group.group_id)
        self.scheduler.check()

    def finish(self, max_steps: int = 200) -> None:
        """Deliver everything at once and step until nobody is left."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step(deliver=True)
            for group in self.groups.values():
                if group.is_finished:
                    self.close(group)
        assert not self.engine.has_work, "somebody waits forever"
        self.assert_all_free()

    def is_free(self) -> bool:
        """Nothing is held by anybody."""
        held = self.scheduler.running or self.scheduler.waiting or self.scheduler.groups
        all_blocks = self.blocks.num_free_blocks == self.num_blocks
        return not held and all_blocks and num_granted(self.store) == 0

    def assert_all_free(self) -> None:
        self.scheduler.check()
        assert self.is_free()


def layout(parts: Parts) -> tuple[list[int], tuple[VisualTile, ...]]:
    """Token ids and tiles of a prompt; text depends on its position only, so equal prompts share a prefix."""
    token_ids: list[int] = []
    tiles: list[VisualTile] = []
    for part in parts:
        if isinstance(part, Tile):
            tiles.append(VisualTile(part.name.encode(), len(token_ids), part.num_tokens))
            token_ids += [PLACEHOLDER] * part.num_tokens
        else:
            start = len(token_ids)
            token_ids += [2 + position % 50 for position in range(start, start + part)]
    return token_ids, tuple(tiles)


def outputs(group: SequenceGroup) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in group.sequences]


def alone(
    parts: Parts, max_tokens: int = 4, make_world: Callable[..., World] | None = None, **options: object
) -> list[list[int]]:
    """What the request gives in an engine that it has to itself, step after step."""
    world = (make_world or World)(num_blocks=256, num_slots=64, budget=1024)
    group = world.add(parts, max_tokens, **options)  # type: ignore[arg-type]
    world.finish()
    assert all(s.finish_reason is not FinishReason.ABORT for s in group.sequences)
    return outputs(group)


class ServedWorld:
    """A World behind a real EngineHost on a real unix socket, in a thread of this process."""

    def __init__(
        self,
        path: Path,
        world: World,
        max_waiting: int = 100,
        parent: IO[bytes] | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.path, self.world = path, world
        self.error: Exception | None = None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(128)  # a full queue would refuse connections that tests make one after another
        self.listener = listener
        self.ready = EngineReady(
            max_model_len=world.max_model_len or world.num_blocks * world.block_size,
            vocab_size=VOCAB_SIZE,
            hidden_size=1,
            dtype="int64",
            num_slots=world.num_slots,
            slot_tokens=SLOT_TOKENS,
            num_blocks=world.num_blocks,
            block_size=world.block_size,
            language_digest=b"d" * 32,
        )
        self.host = EngineHost(
            world.engine, listener, self.ready, world.memory.fd, max_waiting, parent, grammars=grammars
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.host.run()
        except Exception as error:
            self.error = error
        finally:
            self.listener.close()

    def connect(self) -> socket.socket:
        """A front end's bare socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(10)
        connection.connect(str(self.path))
        return connection

    def stop(self) -> None:
        self.host.stop()
        if self.thread.is_alive():
            with suppress(OSError):  # a new connection wakes the loop up
                self.connect().close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def prompt_input(parts: Parts, max_tokens: int = 4, **options: object) -> PromptInput:
    """The request of `World.add`, as a front end submits it."""
    token_ids, tiles = layout(parts)
    return PromptInput(
        token_ids,
        [PromptTile(tile.key, tile.offset, tile.num_tokens) for tile in tiles],
        SamplingParams(temperature=0.0, **options),  # type: ignore[arg-type]
        [],
        max_tokens,
    )


def store_granted(request: EngineRequest, prompt: PromptInput, grant: SlotGrant) -> None:
    """What a front end does when the encoder has sent the tile."""
    tile = prompt.tiles[grant.tile_index]
    request.write_tile(grant, tile_rows(tile.key, tile.num_tokens))
    request.announce_tile(grant)


async def generate(
    client: EngineClient, parts: Parts, max_tokens: int = 4, **options: int
) -> list[list[int]]:
    """All choices of one request, its tiles delivered at once."""
    prompt = prompt_input(parts, max_tokens, **options)
    request = client.submit(prompt)
    tokens: list[list[int]] = [[] for _ in range(prompt.params.n)]
    num_finished = 0
    try:
        async with asyncio.timeout(20):
            while num_finished < len(tokens):
                event = await request.next_event()
                if isinstance(event, SlotGrant):
                    store_granted(request, prompt, event)
                elif isinstance(event, SequenceOutput):
                    tokens[event.index] += [token.token_id for token in event.tokens]
                    num_finished += event.finish_reason is not None
    finally:
        request.close()
    return tokens
