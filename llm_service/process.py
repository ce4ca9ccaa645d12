"""The life of the language-model service's process: its engine, its encoders, its server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import torch

from llm_service.config import LLMConfig
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import LayoutCache
from llm_service.engine_client import EngineClient
from llm_service.engine_processes import EngineProcesses
from llm_service.generation import Backends
from llm_service.generation_config import read_generation_config
from llm_service.grammar_checks import GrammarChecks
from llm_service.metrics import watch_load
from llm_service.prompt import PromptBuilder
from llm_service.sampling_params import SamplingParams
from llm_service.servicer import SERVICE_NAME, LanguageModelServicer
from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import Checkpoint, open_checkpoint
from protos.errors import Unavailable
from protos.fingerprint import FingerprintBase, language_digest
from protos.preprocessing import Preprocessing
from protos.server import Server, shutdown_signal
from protos.stall import withdraw_while_stalled

# A front end only copies tiles: a pool of threads that wakes and spins for each copy takes the cores from
# the engine and from gRPC (measured on 2 cores: 1.2 GiB/s of tiles with two threads, 1.9 with one).
FRONT_END_THREADS = 1

log = logging.getLogger(__name__)


async def serve(config: LLMConfig, on_ready: Callable[[int], None]) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        CheckpointError, ValueError, OSError: it cannot start as configured.
        Unavailable: the engine did not start, or ended while requests were served.
    """
    torch.set_num_threads(FRONT_END_THREADS)
    async with AsyncExitStack() as stack:
        checkpoint = await asyncio.to_thread(open_checkpoint, config.model)
        sampling_defaults = _sampling_defaults(config, checkpoint)
        # The engine before the server: gRPC complains about a process that forks after its threads run.
        engine, ends = await _join_or_start_engine(config, checkpoint, stack)
        server = Server(config.server, [SERVICE_NAME])
        backends = _backends(config, checkpoint, engine)
        backends.encoders.start()
        stack.push_async_callback(backends.encoders.close)
        stack.push_async_callback(backends.grammars.close)
        await backends.grammars.start()
        preprocessing = Preprocessing.from_checkpoint(checkpoint)
        servicer = LanguageModelServicer(config, preprocessing, sampling_defaults, backends)
        servicer.add_to(server.grpc)
        watch_load(engine, backends.encoders)
        port = await server.start()
        shutdown = shutdown_signal()
        await server.set_serving()
        stack.push_async_callback(_cancel, asyncio.create_task(_watch_engine(config, engine, server)))
        on_ready(port)
        await _serve_until_end(server, servicer, shutdown, ends)


def _sampling_defaults(config: LLMConfig, checkpoint: Checkpoint) -> SamplingParams:
    if config.generation_config == "none":
        return SamplingParams()
    defaults = read_generation_config(checkpoint)
    if defaults != SamplingParams():
        log.info("sampling defaults of the checkpoint: %s", defaults)
    return defaults


async def _serve_until_end(
    server: Server, servicer: LanguageModelServicer, shutdown: asyncio.Event, ends: list[Awaitable[None]]
) -> None:
    """Drain at a signal; raise when the engine, or a rank of it, goes first."""
    stopping = asyncio.create_task(shutdown.wait())
    engine_ends = [asyncio.ensure_future(end) for end in ends]
    try:
        await asyncio.wait((stopping, *engine_ends), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await server.set_serving(False)
            raise Unavailable("the engine ended; see its message above")
    finally:
        for task in (stopping, *engine_ends):
            task.cancel()
        servicer.drain()
        await server.stop()


async def _watch_engine(config: LLMConfig, engine: EngineClient, server: Server) -> None:
    """An engine that lives sends a message every second, whatever it has to do."""
    limit_s = config.engine_timeout_s
    await withdraw_while_stalled(
        server, "engine", limit_s, lambda: True, lambda: engine.num_messages, engine.set_stalled
    )


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _join_or_start_engine(
    config: LLMConfig, checkpoint: Checkpoint, stack: AsyncExitStack
) -> tuple[EngineClient, list[Awaitable[None]]]:
    """The engine, and what completes when it has ended."""
    engine = await _join_engine(config.engine_socket, checkpoint)
    ends: list[Awaitable[None]] = []
    if engine is None:
        processes = EngineProcesses(config.model, config.engine, config.engine_socket)
        stack.push_async_callback(processes.stop)
        await processes.start()
        engine = await EngineClient.connect(processes.socket_path)
        ends.append(processes.wait())
    stack.push_async_callback(engine.close)
    return engine, [*ends, engine.wait_closed()]


async def _join_engine(socket_path: str, checkpoint: Checkpoint) -> EngineClient | None:
    """The engine that listens there; None without one, and what a killed one left behind is removed.

    Raises:
        ValueError: it serves another language model.
        Unavailable: it does not answer.
    """
    path = Path(socket_path)
    if not socket_path or not path.is_socket():
        return None
    try:
        engine = await EngineClient.connect(path)
    except ConnectionRefusedError:  # nobody has a socket there before it listens
        path.unlink(missing_ok=True)
        return None
    except OSError as error:
        raise Unavailable(f"engine_socket {path}: the engine does not answer ({error})") from error
    if engine.ready.language_digest != await asyncio.to_thread(language_digest, checkpoint):
        await engine.close()
        raise ValueError(f"engine_socket {path}: its engine serves another model than {checkpoint.folder}")
    log.info("joined the engine at %s: engine flags are those it was started with", path)
    return engine


def _backends(config: LLMConfig, checkpoint: Checkpoint, engine: EngineClient) -> Backends:
    tokenizer = load_tokenizer(checkpoint.folder)
    return Backends(
        engine=engine,
        grammars=GrammarChecks(tokenizer.strips_leading_space),
        encoders=EncoderPool(config.encoder_pool, FingerprintBase(checkpoint)),
        layouts=LayoutCache(),
        tokenizer=tokenizer,
        prompts=PromptBuilder.from_checkpoint(checkpoint, tokenizer),
        request_timeout_s=config.request_timeout_s,
    )
