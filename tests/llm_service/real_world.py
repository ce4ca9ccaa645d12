"""The real engine over a tiny decoder, on any device, behind the World that the stories are told in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from llm_service.attention.base import AttentionBackend, select_backend
from llm_service.capacity import Capacity
from llm_service.config import EngineConfig
from llm_service.cuda_launcher import build_cuda_launcher
from llm_service.kv_cache import KVCache
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.model.weights import load_decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.sampler import Sampler
from llm_service.step_launcher import StepLauncher, SynchronousLauncher
from llm_service.visual_memory import VisualMemory
from protos.checkpoint import open_checkpoint
from tests.llm_service.fakes import SLOT_TOKENS, LateLauncher, World
from tests.llm_service.random_life import RandomLife

NUM_STEPS, NUM_LIVES = 1000, 8  # steps in all


@dataclass(frozen=True)
class Model:
    """A tiny decoder on one device."""

    decoder: Decoder
    backend: AttentionBackend
    device: torch.device
    pinned: list[VisualMemory] = field(default_factory=list)  # what is page-locked must stay mapped

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def world(self, **options: object) -> RealWorld:
        return RealWorld(model=self, **{"block_size": self.backend.block_size, **options})  # type: ignore[arg-type]

    def undisturbed(self, **options: object) -> RealWorld:
        """One step at a time and operation by operation, whatever the options say."""
        return self.world(**{**options, "overlap": False, "cuda_graphs": "off"})


def load(folder: Path, device: torch.device, backend: AttentionBackend | None = None) -> Model:
    checkpoint = open_checkpoint(str(folder))
    config, backend = DecoderConfig.from_checkpoint(checkpoint), backend or select_backend("auto", device)
    decoder = load_decoder(checkpoint, config, TensorParallel(), backend, device, torch.float32, "auto")
    return Model(decoder, backend, device)


@dataclass(eq=False)
class RealWorld(World):
    """A World whose tokens come from a decoder; on the CPU, overlapping steps run as late as they can."""

    model: Model | None = None
    cuda_graphs: str = "auto"

    def make_memory(self) -> VisualMemory:
        assert self.model is not None
        memory = VisualMemory.create(
            self.num_slots, SLOT_TOKENS, self.model.config.hidden_size, torch.float32
        )
        if self.model.device.type == "cuda" and self.overlap:
            memory.pin()
            self.model.pinned.append(memory)
        return memory

    def make_launcher(self) -> StepLauncher:
        assert self.model is not None
        decoder, backend, device = self.model.decoder, self.model.backend, self.model.device
        if device.type == "cuda":
            config = EngineConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.budget,
                cuda_graphs=self.cuda_graphs,
            )
            longest = self.max_model_len or self.num_blocks * self.block_size
            capacity = Capacity(self.num_blocks, longest, self.num_slots, SLOT_TOKENS)
            return build_cuda_launcher(decoder, backend, self.memory, config, capacity, torch.float32, device)
        cache = KVCache.allocate(
            self.model.config, self.num_blocks, self.block_size, TensorParallel(), torch.float32, device
        )
        runner = ModelRunner(decoder, cache, backend, self.memory, device)
        launcher = SynchronousLauncher(runner, Sampler(device, seed=0), device)
        return LateLauncher(launcher) if self.overlap else launcher

    def tile_rows(self, key: bytes, num_tokens: int) -> torch.Tensor:
        assert self.model is not None
        generator = torch.Generator().manual_seed(int.from_bytes(key[:6].ljust(6), "little"))
        return torch.randn(num_tokens, self.model.config.hidden_size, generator=generator)


def live_and_compare(model: Model, scale: int = 1, min_preemptions: int = 11) -> None:
    """Every request gives what it gives alone; `scale` is RandomLife's."""
    num_finished = num_preemptions = 0
    for seed in range(NUM_LIVES):
        life = RandomLife(
            seed,
            make_world=lambda **options: model.world(**{"overlap": True, **options}),
            make_reference=model.undisturbed,
            vocab_size=model.config.vocab_size,
            block_size=model.backend.block_size,
            scale=scale,
        )
        life.live(NUM_STEPS // NUM_LIVES)
        life.world.finish(max_steps=1500)
        num_finished += life.assert_all_as_alone()
        num_preemptions += life.world.scheduler.num_preemptions
    assert num_finished > 100 and num_preemptions >= min_preemptions
