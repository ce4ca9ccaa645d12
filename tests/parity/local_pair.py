"""Encoder and engine of one checkpoint in this process: real parts, and a test decides when tiles arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from encoder_service.tiling import TileCutter, TilePlan, TilingOptions, plan_tiles
from encoder_service.vision import VisionEncoder
from llm_service.attention.base import select_backend
from llm_service.capacity import Capacity, plan_capacity, resolve_limits
from llm_service.config import EngineConfig
from llm_service.engine import Engine
from llm_service.engine_process import build_engine
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput
from llm_service.model.config import DecoderConfig
from llm_service.model.weights import load_decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.prompt import Prompt, PromptBuilder
from llm_service.sampler import Sampler
from llm_service.sampling_params import SamplingParams
from llm_service.scheduler import TileGrant
from llm_service.sequence import QueueRank, SequenceGroup, VisualTile
from llm_service.step_launcher import SynchronousLauncher
from llm_service.tokenizer import load_tokenizer
from llm_service.visual_memory import VisualMemory
from protos.checkpoint import open_checkpoint
from protos.fingerprint import content_hash, language_digest
from tests.parity.scenarios import Picture, Scenario

CPU = torch.device("cpu")
NUM_TOKENS = 48


class EncoderDead(Exception):
    """A tile was asked for after the encoder had died."""


class LocalPair:
    """A checkpoint's weights, loaded once; engines of any configuration are made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint = open_checkpoint(str(folder))
        self.language_digest = language_digest(checkpoint)
        self.vision = VisionEncoder.load(checkpoint, CPU)
        self.prompts = PromptBuilder.from_checkpoint(checkpoint, load_tokenizer(checkpoint.folder))
        self.backend = select_backend("auto", CPU)
        self.model_config = DecoderConfig.from_checkpoint(checkpoint)
        self.dtype = torch.float32
        self.decoder = load_decoder(
            checkpoint, self.model_config, TensorParallel(), self.backend, CPU, self.dtype
        )
        self._embeds: dict[Picture, torch.Tensor] = {}

    def plan(self, picture: Picture) -> TilePlan:
        defaults = self.vision.preprocessing
        options = TilingOptions(
            defaults.min_tiles, picture.max_tiles or defaults.max_tiles, defaults.use_thumbnail
        )
        return plan_tiles(*picture.image.size, options, defaults.image_size)

    def tiles(self, picture: Picture) -> torch.Tensor:
        """uint8 [num_tiles, 3, S, S]"""
        plan = self.plan(picture)
        cutter = TileCutter(picture.image, plan, self.vision.preprocessing.image_size)
        return cutter.cut(range(plan.num_tiles))

    def embeds(self, picture: Picture) -> torch.Tensor:
        """[num_tiles, tokens_per_tile, hidden_size]"""
        if picture not in self._embeds:
            self._embeds[picture] = self.vision.encode(self.tiles(picture))
        return self._embeds[picture]

    def num_tokens(self, picture: Picture) -> int:
        return self.plan(picture).num_tiles * self.vision.preprocessing.tokens_per_tile

    def prompt(self, scenario: Scenario) -> Prompt:
        pictures = scenario.pictures
        return self.prompts.build(scenario.messages(), [self.num_tokens(picture) for picture in pictures])

    def engine(self, **settings: int | bool) -> LocalEngine:
        return LocalEngine(self, EngineConfig(device="cpu", **{"kv_cache_gib": 0.01, **settings}))


@dataclass
class WatchedRunner:
    """The real runner; remembers which visual rows it was told to read, and lets a test hold it up."""

    runner: ModelRunner
    slots_read: list[int] = field(default_factory=list)
    before_forward: Callable[[], None] = lambda: None

    def forward(self, step: StepInput) -> torch.Tensor:
        self.before_forward()
        self.slots_read += [rows.slot for rows in step.visual_rows]
        return self.runner.forward(step)


@dataclass(frozen=True)
class Tile:
    """A granted tile on its way from the encoder."""

    grant: TileGrant
    picture: Picture
    number: int  # inside the picture


# Which of the tiles under way arrive now.
Delivery = Callable[[Sequence[Tile]], Sequence[Tile]]


def at_once(under_way: Sequence[Tile]) -> Sequence[Tile]:
    return under_way


class LocalEngine:
    def __init__(self, pair: LocalPair, config: EngineConfig) -> None:
        config = resolve_limits(config, CPU)
        self.pair = pair
        self.capacity: Capacity = plan_capacity(
            config,
            pair.model_config,
            pair.vision.preprocessing.tokens_per_tile,
            pair.backend.block_size,
            pair.dtype,
            CPU,
            TensorParallel(),
        )
        size = pair.model_config.hidden_size
        self.memory = VisualMemory.create(
            self.capacity.num_slots, self.capacity.slot_tokens, size, pair.dtype
        )
        kv_cache = KVCache.allocate(
            pair.model_config,
            self.capacity.num_blocks,
            pair.backend.block_size,
            TensorParallel(),
            pair.dtype,
            CPU,
        )
        runner = ModelRunner(pair.decoder, kv_cache, pair.backend, self.memory, CPU)
        self.runner = WatchedRunner(runner)
        launcher = SynchronousLauncher(self.runner, Sampler(CPU), CPU)
        self.engine: Engine = build_engine(config, self.capacity, pair.backend.block_size, launcher)
        self.encoder_is_alive = True
        self.num_encoded = 0
        self.num_steps = 0
        self.under_way: list[Tile] = []
        self._ids = count()
        self._tiles: dict[int, list[tuple[Picture, int]]] = {}

    @property
    def num_preemptions(self) -> int:
        return self.engine.scheduler.num_preemptions

    def submit(
        self, scenario: Scenario, max_tokens: int = NUM_TOKENS, n: int = 1, cache_salt: bytes = b""
    ) -> SequenceGroup:
        prompt = self.pair.prompt(scenario)
        group_id = next(self._ids)
        tiles: list[VisualTile] = []
        self._tiles[group_id] = []
        for placeholder, picture in zip(prompt.placeholders, scenario.pictures, strict=True):
            offset = placeholder.offset
            key = cache_salt + content_hash(picture.png, 1, picture.max_tiles or 12, True, b"")
            for number, embeds in enumerate(self.pair.embeds(picture)):
                tiles.append(VisualTile(key + number.to_bytes(4, "little"), offset, len(embeds)))
                self._tiles[group_id].append((picture, number))
                offset += len(embeds)
        group = SequenceGroup(
            group_id=group_id,
            rank=QueueRank(0, group_id),
            prompt_token_ids=prompt.token_ids,
            tiles=tuple(tiles),
            params=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, n=n),
            stop_token_ids=frozenset(),
            max_tokens=max_tokens,
            cache_salt=cache_salt,
        )
        self.engine.add(group)
        return group

    def step(self, delivery: Delivery = at_once) -> bool:
        """One step, then the tiles that `delivery` lets through; False when nothing could be computed."""
        result = self.engine.step()
        self.num_steps += 1
        self.engine.scheduler.check()
        for grant in result.grants:
            if not self.encoder_is_alive:
                raise EncoderDead(f"tile {grant.tile_index} of request {grant.group_id}")
            self.num_encoded += 1
            self.under_way.append(Tile(grant, *self._tiles[grant.group_id][grant.tile_index]))
        for tile in list(delivery(self.under_way)):
            self.deliver(tile)
        return result.has_computed

    def deliver(self, tile: Tile) -> None:
        self.under_way.remove(tile)
        self.memory.write(tile.grant.slot, self.pair.embeds(tile.picture)[tile.number])
        self.engine.scheduler.tile_stored(tile.grant.group_id, tile.grant.tile_index)

    def run(self, delivery: Delivery = at_once) -> None:
        """Until every request has ended."""
        idle_steps = 0
        while self.engine.has_work:
            idle_steps = 0 if self.step(delivery) else idle_steps + 1
            assert idle_steps < 1000, "nothing is computed and nothing arrives"

    def answer(self, scenario: Scenario) -> list[int]:
        group = self.submit(scenario)
        self.run()
        return outputs(group)[0]


def outputs(group: SequenceGroup) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in group.sequences]
