"""One rank of the engine as a process: `python -m llm_service.engine_process`.

Reads its settings as one JSON line from stdin and keeps stdin open: when it ends, whoever started the engine
is gone, and so does the engine.  Rank 0 prints "ready" when front ends may connect.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import IO

import msgspec
import torch

from llm_service import parallel as tensor_parallel
from llm_service.attention.base import AttentionBackend, select_backend
from llm_service.block_manager import BlockManager
from llm_service.capacity import (
    Capacity,
    check_quantization,
    gpu_capability,
    plan_capacity,
    resolve_device,
    resolve_dtype,
    resolve_limits,
)
from llm_service.config import EngineConfig
from llm_service.cuda_launcher import CudaLauncher, build_cuda_launcher
from llm_service.engine import Engine
from llm_service.engine_host import MAX_FAILED_STEPS, EngineHost
from llm_service.engine_listener import EngineListener
from llm_service.grammar import GrammarVocabulary
from llm_service.grammar_compiler import GrammarCompiler, grammar_vocabulary
from llm_service.kv_cache import KVCache
from llm_service.messages import EngineReady
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.model.weights import load_decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.ranks import ParallelRunner, RankClient, RankServer, RankSetup
from llm_service.rehearsal import hold, rehearse
from llm_service.sampler import Sampler
from llm_service.scheduler import Scheduler, SchedulerConfig
from llm_service.step_launcher import StepLauncher, SynchronousLauncher
from llm_service.tokenizer import load_tokenizer
from llm_service.visual_memory import SHARED_MEMORY_DIR, VisualMemory
from llm_service.visual_store import VisualStore
from protos.checkpoint import Checkpoint, open_checkpoint
from protos.fingerprint import language_digest
from protos.malloc import tune_malloc
from protos.preprocessing import Preprocessing

READY_LINE = "ready"
PARENT_GRACE_S = 0.5  # for the event loop to stop by itself

log = logging.getLogger(__name__)


class EngineSettings(msgspec.Struct, frozen=True):
    model: str
    engine: EngineConfig
    rank: int
    socket_path: str  # where rank 0 listens for front ends
    ranks_path: str  # where rank 0 listens for the other ranks
    rendezvous_path: str  # file through which the ranks find each other
    log_level: str


class Rank:
    """What every rank builds before it knows the capacity."""

    def __init__(self, settings: EngineSettings, checkpoint: Checkpoint) -> None:
        config = settings.engine
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.device = resolve_device(config.device, settings.rank)
        self.config = resolve_limits(config, self.device)
        self._step_bytes = 0  # of a GPU, once rehearsed
        self.dtype = resolve_dtype(config.dtype, checkpoint)
        check_quantization(config.quantization, gpu_capability(self.device), self.dtype)
        self.model_config = DecoderConfig.from_checkpoint(checkpoint)
        self.parallel: TensorParallel = tensor_parallel.init(
            settings.rank,
            config.tensor_parallel_size,
            f"file://{settings.rendezvous_path}",
            self.device,
        )
        self.backend: AttentionBackend = select_backend(config.attention_backend, self.device, self.dtype)
        self.decoder: Decoder = load_decoder(
            checkpoint,
            self.model_config,
            self.parallel,
            self.backend,
            self.device,
            self.dtype,
            config.load_format,
            config.quantization,
        )

    def rehearse(self) -> None:
        """On a GPU, and then on all ranks at once: run the largest steps."""
        if self.device.type == "cuda":
            self._step_bytes = rehearse(
                self.decoder, self.backend, self.config, self.parallel, self.dtype, self.device
            )

    def runner(self, num_blocks: int, memory: VisualMemory) -> ModelRunner:
        kv_cache = KVCache.allocate(
            self.model_config, num_blocks, self.backend.block_size, self.parallel, self.dtype, self.device
        )
        return ModelRunner(self.decoder, kv_cache, self.backend, memory, self.device)

    def cuda_launcher(self, capacity: Capacity, memory: VisualMemory) -> CudaLauncher:
        """For a GPU that holds the whole model."""
        memory.pin()
        launcher = build_cuda_launcher(
            self.decoder, self.backend, memory, self.config, capacity, self.dtype, self.device
        )
        hold(self._step_bytes, self.device)
        return launcher

    def plan_capacity(self, checkpoint: Checkpoint) -> Capacity:
        tokens_per_tile = Preprocessing.from_checkpoint(checkpoint).tokens_per_tile
        return plan_capacity(
            self.config,
            self.model_config,
            tokens_per_tile,
            self.backend.block_size,
            self.dtype,
            self.device,
            self.parallel,
        )

    def create_memory(self, capacity: Capacity) -> VisualMemory:
        """Raises ValueError where shared memory is too small."""
        size = self.model_config.hidden_size
        try:
            return VisualMemory.create(capacity.num_slots, capacity.slot_tokens, size, self.dtype)
        except OSError as error:
            raise ValueError(
                f"visual_store_gib {self.config.visual_store_gib}: {capacity.num_slots} slots do not fit "
                f"into shared memory ({error.strerror}); lower it or enlarge {SHARED_MEMORY_DIR}"
            ) from error

    def memory(self, fd: int, setup: RankSetup) -> VisualMemory:
        size = self.model_config.hidden_size
        return VisualMemory(fd, setup.num_slots, setup.slot_tokens, size, self.dtype)


def run_rank_zero(settings: EngineSettings, checkpoint: Checkpoint, output: IO[str]) -> None:
    vocab_size = DecoderConfig.from_checkpoint(checkpoint).vocab_size
    with (
        closing(EngineListener(Path(settings.socket_path))) as listener,
        closing(GrammarCompiler(lambda: _grammar_vocabulary(checkpoint, vocab_size))) as grammars,
    ):
        host = _load_host(settings, checkpoint, listener, grammars)
        listener.publish()
        print(READY_LINE, file=output, flush=True)
        host.run()


def _load_host(
    settings: EngineSettings, checkpoint: Checkpoint, listener: EngineListener, grammars: GrammarCompiler
) -> EngineHost:
    others = settings.engine.tensor_parallel_size - 1
    ranks = RankServer(Path(settings.ranks_path), others) if others else None
    rank = Rank(settings, checkpoint)
    rank.rehearse()
    capacity = rank.plan_capacity(checkpoint)
    memory = rank.create_memory(capacity)
    if ranks is not None:
        setup = RankSetup(capacity.num_blocks, capacity.num_slots, capacity.slot_tokens)
        ranks.send_setup(setup, memory.fd)
    launcher = _launcher(rank, capacity, memory, ranks)
    # What is here stays: collections that went through it would hold up steps for tenths of a second.
    gc.collect()
    gc.freeze()
    overlap = isinstance(launcher, CudaLauncher)
    engine = build_engine(rank.config, capacity, rank.backend.block_size, launcher, overlap)
    ready = _ready(rank, capacity, checkpoint)
    _log_ready(ready, rank.device)
    # Ranks that failed at different places would meet in the wrong collective: only a restart helps.
    max_failed_steps = MAX_FAILED_STEPS if ranks is None else 1
    max_waiting = rank.config.max_waiting
    return EngineHost(
        engine, listener.socket, ready, memory.fd, max_waiting, sys.stdin.buffer, max_failed_steps, grammars
    )


def _grammar_vocabulary(checkpoint: Checkpoint, vocab_size: int) -> GrammarVocabulary:
    return grammar_vocabulary(load_tokenizer(checkpoint.folder), vocab_size)


def _launcher(rank: Rank, capacity: Capacity, memory: VisualMemory, ranks: RankServer | None) -> StepLauncher:
    if ranks is None and rank.device.type == "cuda":
        return rank.cuda_launcher(capacity, memory)
    local = rank.runner(capacity.num_blocks, memory)
    runner = local if ranks is None else ParallelRunner(local, ranks)
    return SynchronousLauncher(runner, Sampler(rank.device), rank.device)


def run_other_rank(settings: EngineSettings, checkpoint: Checkpoint) -> None:
    rank = Rank(settings, checkpoint)
    rank.rehearse()
    client = RankClient(Path(settings.ranks_path))
    setup, fd = client.receive_setup()
    runner = rank.runner(setup.num_blocks, rank.memory(fd, setup))
    for step in client.steps():
        runner.forward(step)


def build_engine(
    config: EngineConfig, capacity: Capacity, block_size: int, launcher: StepLauncher, overlap: bool = False
) -> Engine:
    """`config` has been through resolve_limits."""
    store = VisualStore(capacity.num_slots)
    blocks = BlockManager(capacity.num_blocks, block_size, config.enable_prefix_caching)
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=capacity.max_model_len,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        enable_encoding_overlap=config.enable_encoding_overlap,
        min_overlap_tokens=config.min_overlap_tokens,
        overlap_on_shared_gpu=config.overlap_on_shared_gpu,
    )
    return Engine(Scheduler(scheduler_config, blocks, store), store, launcher, overlap)


def _ready(rank: Rank, capacity: Capacity, checkpoint: Checkpoint) -> EngineReady:
    return EngineReady(
        max_model_len=capacity.max_model_len,
        vocab_size=rank.model_config.vocab_size,
        hidden_size=rank.model_config.hidden_size,
        dtype=str(rank.dtype).removeprefix("torch."),
        num_slots=capacity.num_slots,
        slot_tokens=capacity.slot_tokens,
        num_blocks=capacity.num_blocks,
        block_size=rank.backend.block_size,
        language_digest=language_digest(checkpoint),
        gpu_uuid=_gpu_uuid(rank.device),
    )


def _gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _log_ready(ready: EngineReady, device: torch.device) -> None:
    log.info(
        "engine ready: %d KV blocks of %d tokens, context %d, %d visual slots, %s on %s",
        ready.num_blocks,
        ready.block_size,
        ready.max_model_len,
        ready.num_slots,
        ready.dtype,
        device,
    )


def _claim_stdout() -> IO[str]:
    """Stdout for "ready" alone: what libraries print goes to stderr, for nobody reads on after that line."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def _exit_with_parent() -> None:
    """End this process soon after stdin has, even while it loads or hangs in a collective."""
    # Not through sys.stdin: Python aborts when it shuts down while a thread holds that buffer's lock.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    time.sleep(PARENT_GRACE_S)
    os._exit(1)


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSettings)
    output = _claim_stdout()
    logging.basicConfig(
        level=settings.log_level, format=f"%(asctime)s engine[{settings.rank}] %(levelname)s %(message)s"
    )
    tune_malloc()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        checkpoint = open_checkpoint(settings.model)
        if settings.rank == 0:
            run_rank_zero(settings, checkpoint, output)
        else:
            run_other_rank(settings, checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
