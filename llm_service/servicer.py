"""LanguageModel of the contract: protobuf in, protobuf out, and the life of the service's process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import torch

from llm_service.config import LLMConfig
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import LayoutCache
from llm_service.engine_client import EngineClient
from llm_service.engine_processes import EngineProcesses
from llm_service.from_proto import (
    MAX_CACHE_SALT_BYTES,
    RequestLimits,
    detokenize_from_proto,
    generation_from_proto,
    messages_from_proto,
)
from llm_service.generation import Backends, Generation, GenerationUsage
from llm_service.generation_config import read_generation_config
from llm_service.grammar_checks import GrammarChecks
from llm_service.metrics import count_usage, watch_load
from llm_service.prompt import Message, PromptBuilder, TextPart
from llm_service.sampling_params import SamplingParams
from llm_service.session import Session
from llm_service.to_proto import event_to_proto
from llm_service.tokenizer import load_tokenizer
from llm_service.uploads import UploadStore
from protos import encoder_pb2, language_model_pb2, language_model_pb2_grpc
from protos.checkpoint import Checkpoint, open_checkpoint
from protos.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from protos.fingerprint import FingerprintBase, language_digest
from protos.options import MAX_CHUNK_BYTES
from protos.preprocessing import Preprocessing
from protos.request_context import Metadata, accept_request_id, outgoing_metadata, request_id_of
from protos.server import Server, shutdown_signal
from protos.stall import StallWatch
from protos.statuses import rpc_errors

SERVICE_NAME = language_model_pb2.DESCRIPTOR.services_by_name["LanguageModel"].full_name

# A front end only copies tiles: a pool of threads that wakes and spins for each copy takes the cores from
# the engine and from gRPC (measured on 2 cores: 1.2 GiB/s of tiles with two threads, 1.9 with one).
FRONT_END_THREADS = 1

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class LanguageModelServicer(language_model_pb2_grpc.LanguageModelServicer):
    """Generate, Session, UploadMedia, Tokenize, Detokenize, GetModel."""

    def __init__(
        self,
        config: LLMConfig,
        preprocessing: Preprocessing,
        sampling_defaults: SamplingParams,
        backends: Backends,
    ) -> None:
        self._config = config
        self._preprocessing = preprocessing
        self._sampling_defaults = sampling_defaults
        self._backends = backends
        self._sessions: set[Session] = set()
        self._draining = False
        self._limits = RequestLimits(
            vocab_size=backends.engine.ready.vocab_size,
            max_model_len=backends.engine.ready.max_model_len,
            max_images=config.max_images,
            max_image_tiles=config.max_image_tiles,
            max_request_bytes=config.max_request_bytes,
            max_video_frames=config.max_video_frames,
        )
        self._uploads = UploadStore(config.uploads)

    async def Generate(
        self, request: language_model_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[language_model_pb2.GenerateResponse]:
        request_id = request_id_of(context, request.request_id)
        metadata = outgoing_metadata(request_id, tuple(context.invocation_metadata() or ()))
        async with rpc_errors(context):
            generation = self._generation(request, metadata)
            # Closed at once, not when the collector finds the generator: blocks and slots hang on it.
            async with aclosing(generation.run()) as events:
                async for event in events:
                    if isinstance(event, GenerationUsage):
                        count_usage(event)
                    yield event_to_proto(event, request_id)

    async def Session(
        self, requests: AsyncIterator[language_model_pb2.SessionRequest], context: Context
    ) -> AsyncIterator[language_model_pb2.SessionResponse]:
        session = Session(self._session_generation)
        self._sessions.add(session)
        if self._draining:
            session.drain()
        try:
            async with rpc_errors(context), aclosing(session.run(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._sessions.discard(session)

    async def UploadMedia(
        self, requests: AsyncIterator[language_model_pb2.UploadMediaRequest], context: Context
    ) -> language_model_pb2.UploadMediaResponse:
        async with rpc_errors(context):
            try:
                return await self._take_upload(requests, _caller(context))
            except (InvalidRequest, Overloaded):
                await self._discard(requests)
                raise

    async def _discard(self, requests: AsyncIterator[language_model_pb2.UploadMediaRequest]) -> None:
        """A caller whose writes fail does not see our status: https://github.com/grpc/grpc/issues/36066."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._uploads.config.upload_timeout_s):
                async for _ in requests:
                    pass

    async def _take_upload(
        self, requests: AsyncIterator[language_model_pb2.UploadMediaRequest], caller: str
    ) -> language_model_pb2.UploadMediaResponse:
        first = await self._next_piece(requests) or language_model_pb2.UploadMediaRequest()
        upload = self._uploads.begin(caller, first.cache_salt, first.num_bytes)
        try:
            piece: language_model_pb2.UploadMediaRequest | None = first
            while piece is not None:
                upload.add(_checked_piece(piece))
                piece = await self._next_piece(requests)
            digest = upload.finish()
        finally:
            upload.abandon()
        return language_model_pb2.UploadMediaResponse(
            upload=digest, num_bytes=upload.num_bytes, ttl_s=self._uploads.config.upload_ttl_s
        )

    async def _next_piece(
        self, requests: AsyncIterator[language_model_pb2.UploadMediaRequest]
    ) -> language_model_pb2.UploadMediaRequest | None:
        try:
            async with asyncio.timeout(self._uploads.config.upload_timeout_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded("the upload stalled") from None

    def drain(self) -> None:
        """Let sessions, which never end by themselves, end with their last request."""
        self._draining = True
        for session in self._sessions:
            session.drain()

    async def Tokenize(
        self, request: language_model_pb2.TokenizeRequest, context: Context
    ) -> language_model_pb2.TokenizeResponse:
        async with rpc_errors(context):
            if request.WhichOneof("input") == "messages":
                token_ids = await self._conversation_ids(request.messages)
            else:
                token_ids = await asyncio.to_thread(self._backends.tokenizer.encode_plain, request.text)
            return language_model_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: language_model_pb2.DetokenizeRequest, context: Context
    ) -> language_model_pb2.DetokenizeResponse:
        async with rpc_errors(context):
            token_ids = detokenize_from_proto(request, self._limits)
            decode = self._backends.tokenizer.decode
            text = await asyncio.to_thread(decode, token_ids, request.skip_special_tokens)
            return language_model_pb2.DetokenizeResponse(text=text)

    async def GetModel(
        self, request: language_model_pb2.GetLanguageModelRequest, context: Context
    ) -> language_model_pb2.GetLanguageModelResponse:
        async with rpc_errors(context):
            self._backends.engine.require_alive()
            return self._model()

    def _model(self) -> language_model_pb2.GetLanguageModelResponse:
        ready, stats = self._backends.engine.ready, self._backends.engine.stats
        preprocessing = self._preprocessing
        return language_model_pb2.GetLanguageModelResponse(
            model=self._config.model_name,
            max_model_len=ready.max_model_len,
            max_images=self._config.max_images,
            max_request_bytes=self._config.max_request_bytes,
            tokens_per_tile=preprocessing.tokens_per_tile,
            tiling=encoder_pb2.TilingOptions(
                min_tiles=preprocessing.min_tiles,
                max_tiles=preprocessing.max_tiles,
                use_thumbnail=preprocessing.use_thumbnail,
            ),
            max_tiles=self._config.max_image_tiles,
            encoders_ready=self._backends.encoders.num_ready,
            sequences_running=stats.num_running,
            sequences_waiting=stats.num_waiting,
            kv_cache_usage=1 - stats.num_free_blocks / ready.num_blocks,
            max_upload_bytes=self._config.uploads.max_upload_bytes,
            max_video_frames=self._config.max_video_frames,
        )

    async def _conversation_ids(self, conversation: language_model_pb2.Conversation) -> list[int]:
        try:
            messages = _text_only(messages_from_proto(conversation.messages))
            prompt = await asyncio.to_thread(self._backends.prompts.build, messages, [])
        except InvalidRequest as error:
            error.field = f"messages.{error.field}"  # here the messages are in a message of their own
            raise
        return prompt.token_ids

    def _session_generation(self, message: language_model_pb2.SessionGenerate) -> tuple[Generation, str]:
        request_id = accept_request_id(message.request.request_id)
        metadata = outgoing_metadata(request_id, tuple(message.metadata.items()))
        return self._generation(message.request, metadata), request_id

    def _generation(self, request: language_model_pb2.GenerateRequest, metadata: Metadata) -> Generation:
        plain = generation_from_proto(
            request,
            self._preprocessing,
            self._limits,
            self._sampling_defaults,
            metadata,
            self._uploads.get,
        )
        self._refuse_placeholders(plain.prompt_token_ids)
        return Generation(plain, self._backends)

    def _refuse_placeholders(self, prompt_token_ids: list[int]) -> None:
        context_id = self._backends.prompts.context_id
        if context_id in prompt_token_ids:
            raise InvalidRequest(
                f"token id {context_id} stands for visual tokens; pictures go into messages",
                field=f"prompt_token_ids[{prompt_token_ids.index(context_id)}]",
            )


def _checked_piece(message: language_model_pb2.UploadMediaRequest) -> bytes:
    data = message.data  # every access copies
    if len(message.cache_salt) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(f"cache_salt: at most {MAX_CACHE_SALT_BYTES} bytes", field="cache_salt")
    if len(data) > MAX_CHUNK_BYTES:
        raise InvalidRequest(
            f"a message has {len(data)} bytes, at most {MAX_CHUNK_BYTES} are allowed", field="data"
        )
    return data


def _caller(context: Context) -> str:
    """Whose budget it is: a TLS identity, else a host."""
    identities = context.peer_identities() or ()
    return "/".join(str(name) for name in identities) or context.peer().rpartition(":")[0]


def _text_only(messages: list[Message]) -> list[Message]:
    for position, message in enumerate(messages):
        for number, part in enumerate(message.parts):
            if not isinstance(part, TextPart):
                raise InvalidRequest(
                    "pictures cannot be tokenized", field=f"messages[{position}].parts[{number}]"
                )
    return messages


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
        language_model_pb2_grpc.add_LanguageModelServicer_to_server(servicer, server.grpc)
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
    async def note(is_stalled: bool) -> None:
        engine.set_stalled(is_stalled)
        await server.set_serving(not is_stalled)

    limit_s = config.engine_timeout_s
    await StallWatch("engine", limit_s, lambda: True, lambda: engine.num_messages, note).run()


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
