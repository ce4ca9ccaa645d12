"""The LLM service's front end before a real engine whose model is a hash, and a vocabulary to read it."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llm_service.block_manager import BlockManager
from llm_service.config import EncoderPoolConfig
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import LayoutCache
from llm_service.engine import Engine
from llm_service.engine_client import EngineClient
from llm_service.engine_host import EngineHost
from llm_service.generation import Backends
from llm_service.grammar_checks import GrammarChecks
from llm_service.grammar_compiler import GrammarCompiler, grammar_vocabulary
from llm_service.messages import EngineReady, StepInput
from llm_service.prompt import PromptBuilder
from llm_service.sampler import Sampler
from llm_service.scheduler import Scheduler, SchedulerConfig
from llm_service.step_launcher import SynchronousLauncher
from llm_service.templates import ConversationTemplate
from llm_service.tokenizer import Tokenizer
from llm_service.visual_memory import VisualMemory
from llm_service.visual_store import VisualStore
from llm_service.vocabulary import AddedToken
from tests.llm_service.fakes import SLOT_TOKENS, VOCAB_SIZE, FakeRunner, num_granted
from tests.llm_service.scripted_encoder import HIDDEN_SIZE, FixedBase, ScriptedEncoder, encoders

SPECIAL = ("<|endoftext|>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", "<img>", "</img>")
EOS_ID = SPECIAL.index("<|im_end|>")
# One letter a token, two bytes of "é" apart, and some tokens of two letters.
CHUNKS = [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyz \n.?"]
CHUNKS += [b"\xc3", b"\xa9"]
CHUNKS += [bytes([first, second]) for first in b"aeiou" for second in b"lnrst"]
CHUNKS += [b"th"]
BLOCK_SIZE = 4


class Letters:
    """A vocabulary of VOCAB_SIZE ids; what it cannot spell becomes a question mark."""

    strips_leading_space = False
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        known = {chunk: len(SPECIAL) + place for place, chunk in enumerate(CHUNKS)}
        unknown = known[b"?"]
        pieces = [bytes([byte]) for char in text for byte in char.encode()]
        return [known.get(piece, unknown) for piece in pieces]

    def piece_bytes(self, token_id: int) -> bytes:
        return CHUNKS[token_id - len(SPECIAL)] if token_id < len(SPECIAL) + len(CHUNKS) else b""


def make_tokenizer() -> Tokenizer:
    added = {token_id: AddedToken(content, special=True) for token_id, content in enumerate(SPECIAL)}
    return Tokenizer(Letters(), added, [], {"eos_token": "<|im_end|>"})


def make_prompts(tokenizer: Tokenizer) -> PromptBuilder:
    template = ConversationTemplate(
        system_prefix="<|im_start|>s\n",
        system_message="",
        system_suffix="<|im_end|>",
        user_prefix="<|im_start|>u\n",
        user_suffix="<|im_end|>",
        assistant_prefix="<|im_start|>a\n",
        assistant_suffix="<|im_end|>",
        answer_prefix="<|im_start|>a\n",
        stop_tokens=("<|im_end|>",),
    )
    return PromptBuilder(tokenizer, template)


class PacedRunner(FakeRunner):
    """Steps as a test allows them, or fails with what a test gives it."""

    def __init__(self, memory: VisualMemory, block_size: int) -> None:
        super().__init__(memory, block_size)
        self.failure: Exception | None = None
        self.is_held = threading.Event()  # a step has begun and waits to be allowed
        self._permits = threading.Semaphore(0)
        self._is_paced = False

    def pace(self) -> None:
        """From now on every step waits for `allow`."""
        self._is_paced = True

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def unpace(self) -> None:
        self._is_paced = False
        self._permits.release(1000)

    def forward(self, step: StepInput) -> torch.Tensor:
        if self._is_paced:
            self.is_held.set()
            self._permits.acquire()
        if self.failure is not None:
            raise self.failure
        return super().forward(step)


class EngineThread:
    """A real EngineHost on its own thread, behind a real socket."""

    def __init__(self, folder: Path, num_blocks: int, num_slots: int, max_waiting: int) -> None:
        self.store = VisualStore(num_slots)
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, True)
        self.max_model_len = num_blocks * BLOCK_SIZE
        config = SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=64,
            max_model_len=self.max_model_len,
            long_prefill_token_threshold=0,
        )
        self.scheduler = Scheduler(config, self.blocks, self.store)
        self.memory = VisualMemory.create(num_slots, SLOT_TOKENS, HIDDEN_SIZE, torch.int64)
        self.runner = PacedRunner(self.memory, BLOCK_SIZE)
        launcher = SynchronousLauncher(self.runner, Sampler(seed=0), torch.device("cpu"))
        engine = Engine(self.scheduler, self.store, launcher)
        self.path = folder / "engine.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        ready = EngineReady(
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            dtype="int64",
            num_slots=num_slots,
            slot_tokens=SLOT_TOKENS,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            language_digest=b"d" * 32,
        )
        self._grammars = GrammarCompiler(lambda: grammar_vocabulary(make_tokenizer(), VOCAB_SIZE))
        self._host = EngineHost(
            engine, self._listener, ready, self.memory.fd, max_waiting, grammars=self._grammars
        )
        self._thread = threading.Thread(target=self._host.run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    async def stop(self) -> None:
        self._host.stop()
        self.runner.unpace()
        await asyncio.to_thread(self._thread.join, 5)
        assert not self._thread.is_alive()
        self._grammars.close()
        self._listener.close()

    @property
    def is_idle(self) -> bool:
        scheduler = self.scheduler
        return (
            not scheduler.groups
            and not scheduler.running
            and not scheduler.waiting
            and self.blocks.num_free_blocks == self.max_model_len // BLOCK_SIZE
            and num_granted(self.store) == 0
        )

    async def idle(self, seconds: float = 10.0) -> None:
        """Nothing is left of any request: no block, no slot, no place in a queue."""
        for _ in range(int(seconds * 200)):
            if self.is_idle:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"something is left: {self.scheduler.groups}, {num_granted(self.store)} slots")


@dataclass
class FrontEnd:
    backends: Backends
    engine: EngineThread
    encoder: ScriptedEncoder

    def with_timeout(self, seconds: float) -> Backends:
        return replace(self.backends, request_timeout_s=seconds)

    @property
    def streams_open(self) -> int:
        return sum(connection.streams_open for connection in self.backends.encoders.connections)

    async def nothing_is_left(self) -> None:
        """Within one step: blocks, slots and the encoder's work are free again."""
        if self.engine.is_running:
            await self.engine.idle()
        async with asyncio.timeout(10):
            while self.streams_open:
                await asyncio.sleep(0.005)
            for side in self.encoder.sides:
                await side.ended.wait()


@asynccontextmanager
async def front_end(
    encoder: ScriptedEncoder | None = None,
    *,
    num_blocks: int = 64,
    num_slots: int = 16,
    max_waiting: int = 1024,
    initial_credit: int = 2,
    request_timeout_s: float = 30.0,
) -> AsyncIterator[FrontEnd]:
    """Afterwards nothing may be left in the engine or at the encoder."""
    encoder = encoder or ScriptedEncoder()
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineThread(Path(folder), num_blocks, num_slots, max_waiting)
        async with encoders(encoder) as targets:
            config = EncoderPoolConfig(encoders=tuple(targets), initial_credit=initial_credit)
            pool = EncoderPool(config, FixedBase())  # type: ignore[arg-type]
            client = await EngineClient.connect(engine.path)
            tokenizer = make_tokenizer()
            backends = Backends(
                engine=client,
                encoders=pool,
                layouts=LayoutCache(),
                tokenizer=tokenizer,
                prompts=make_prompts(tokenizer),
                grammars=GrammarChecks(tokenizer.strips_leading_space, num_workers=1),
                request_timeout_s=request_timeout_s,
            )
            it = FrontEnd(backends, engine, encoder)
            try:
                yield it
                engine.runner.unpace()
                await it.nothing_is_left()
            finally:
                await backends.grammars.close()
                await client.close()
                await engine.stop()
                await pool.close()
