"""A front end's connection to the engine: requests in, events of each request out."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import torch

from llm_service.frame_socket import READ_BYTES, FrameDecoder, encode_frame
from llm_service.messages import (
    AbortChoice,
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    PromptTile,
    RequestAccepted,
    RequestRefused,
    SequenceOutput,
    SlotGrant,
    StepOutput,
    TileStored,
)
from llm_service.sampling_params import SamplingParams
from llm_service.visual_memory import VisualMemory
from protos.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)

CONNECT_TIMEOUT_S = 10.0
RETRY_AFTER_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptInput:
    """A tokenized request as the engine takes it."""

    token_ids: list[int]
    tiles: list[PromptTile]
    params: SamplingParams
    stop_token_ids: list[int]
    max_tokens: int
    priority: int = 0
    cache_salt: bytes = b""
    takes_turns: bool = False  # with the encoders
    arrival_tokens: int = 0  # see AddRequest
    grammar: str = ""  # see AddRequest


Event = RequestAccepted | SequenceOutput | SlotGrant | ServingError


class EngineRequest:
    """One request's side of the connection.  Whoever made it calls `close`, whatever happened."""

    def __init__(
        self,
        client: EngineClient,
        request_id: int,
        on_grant: Callable[[SlotGrant], None] | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self._client = client
        self._request_id = request_id
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._on_grant = on_grant
        self._on_event = on_event
        self._closed = False

    async def next_event(self) -> Event:
        """The next event.  Raises ServingError when the engine refused the request or is gone."""
        event = await self._events.get()
        if isinstance(event, ServingError):
            raise event
        return event

    def has_event(self) -> bool:
        return not self._events.empty()

    def post(self, event: Event) -> None:
        """An event from elsewhere: an error ends the request behind what has come already."""
        if self._on_event is not None:
            self._on_event(event)
        elif not self._closed:
            self._events.put_nowait(event)

    def take_grant(self, grant: SlotGrant) -> None:
        if self._on_grant is not None:
            self._on_grant(grant)
        else:
            self.post(grant)

    def write_tile(self, grant: SlotGrant, embeds: torch.Tensor) -> None:
        """Write [num_tokens, hidden_size] into the granted slot; ignored after `close`.

        Also when the connection has broken: the engine may have given the slot to somebody else.
        """
        if self._may_write:
            self._client.memory.write(grant.slot, embeds)

    def announce_tile(self, grant: SlotGrant) -> None:
        """The slot has been written, and is the engine's from here on; once, ignored after `close`."""
        if self._may_write:
            self._client.send(TileStored(self._request_id, grant.tile_index))

    @property
    def _may_write(self) -> bool:
        return not (self._closed or self._client.is_closed)

    def abort_choice(self, index: int) -> None:
        """End one choice; its outputs that are on their way still come."""
        if not self._closed:
            self._client.send(AbortChoice(self._request_id, index))

    def close(self) -> None:
        """Free what the engine still holds.  Synchronous and idempotent; no slot is written afterwards."""
        if not self._closed:
            self._closed = True
            # They may know us: no cycle must keep a request's pictures.
            self._on_grant = self._on_event = None
            self._client.forget(self._request_id)


class EngineClient:
    """One connection, many requests.  All of them fail when it breaks; it is not reopened."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ready: EngineReady,
        memory: VisualMemory,
        decoder: FrameDecoder,
    ) -> None:
        self.ready = ready
        self.memory = memory
        self.stats = EngineStats(0, 0, ready.num_blocks, 0)
        self.num_messages = 0  # received: it advances as long as the engine lives
        self._is_stalled = False
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._requests: dict[int, EngineRequest] = {}
        self._ids = count()
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, path: Path) -> EngineClient:
        """Raises OSError when nobody listens at `path`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        try:
            connection.connect(str(path))
            decoder = FrameDecoder(FromEngine)
            ready, fd = await asyncio.to_thread(_receive_ready, connection, decoder)
        except BaseException:
            connection.close()
            raise
        dtype = getattr(torch, ready.dtype)
        memory = VisualMemory(fd, ready.num_slots, ready.slot_tokens, ready.hidden_size, dtype)
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=READ_BYTES)
        return cls(reader, writer, ready, memory, decoder)

    def submit(
        self,
        prompt: PromptInput,
        on_grant: Callable[[SlotGrant], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> EngineRequest:
        """Queue the request; its first event is RequestAccepted, or a refusal.

        `on_grant` is called as soon as a grant arrives, whether or not anybody takes the events: a client
        that reads slowly must not hold slots that nobody fills.  Without it grants are events, too.
        `on_event` is called with each event as it arrives; then there is no queue and no `next_event`.
        It must not raise.

        Raises:
            Unavailable: the engine is gone or stalls.
        """
        self.require_alive()
        request_id = next(self._ids)
        request = EngineRequest(self, request_id, on_grant, on_event)
        self._requests[request_id] = request
        self.send(
            AddRequest(
                request_id=request_id,
                prompt_token_ids=prompt.token_ids,
                tiles=prompt.tiles,
                params=prompt.params,
                stop_token_ids=prompt.stop_token_ids,
                max_tokens=prompt.max_tokens,
                priority=prompt.priority,
                cache_salt=prompt.cache_salt,
                takes_turns=prompt.takes_turns,
                arrival_tokens=prompt.arrival_tokens,
                grammar=prompt.grammar,
            )
        )
        return request

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closing()

    def send(self, message: msgspec.Struct) -> None:
        if not self.is_closed:
            self._writer.write(encode_frame(message))

    def forget(self, request_id: int) -> None:
        """Abort in the engine, which ignores requests that have ended."""
        if self._requests.pop(request_id, None) is not None:
            self.send(AbortRequest(request_id))

    def require_alive(self) -> None:
        """Raises Unavailable: the engine is gone or stalls."""
        if self._receiver.done():
            raise _gone()
        if self._is_stalled:
            raise _stalled()

    def set_stalled(self, is_stalled: bool) -> None:
        """While it stalls, requests fail: whoever asks may have another language model to go to."""
        self._is_stalled = is_stalled
        if is_stalled:
            for request in list(self._requests.values()):
                request.post(_stalled())

    async def wait_closed(self) -> None:
        """Return when the connection to the engine has broken."""
        await asyncio.wait([self._receiver])

    async def close(self) -> None:
        self._receiver.cancel()
        await asyncio.wait([self._receiver])
        self.memory.close()

    async def _receive(self) -> None:
        try:
            while data := await self._reader.read(READ_BYTES):
                for message in self._decoder.feed(data):
                    self._dispatch(message)
        except (OSError, msgspec.DecodeError, ValueError) as error:
            log.error("connection to the engine broke: %s", error)
        finally:
            self._writer.close()
            for request in list(self._requests.values()):
                request.post(_gone())

    def _dispatch(self, message: FromEngine) -> None:
        self.num_messages += 1
        if isinstance(message, StepOutput):
            self.stats = message.stats
            for grant in message.grants:
                request = self._requests.get(grant.request_id)
                if request is not None:
                    request.take_grant(grant)
            for output in message.outputs:
                self._post(output.request_id, output)
        elif isinstance(message, RequestAccepted):
            self._post(message.request_id, message)
        elif isinstance(message, RequestRefused):
            self._post(message.request_id, _refusal(message))

    def _post(self, request_id: int, event: Event) -> None:
        request = self._requests.get(request_id)
        if request is not None:  # closed ones are not interested any more
            request.post(event)


def _receive_ready(connection: socket.socket, decoder: FrameDecoder) -> tuple[EngineReady, int]:
    data, fds, _, _ = socket.recv_fds(connection, READ_BYTES, 1)
    while True:
        for message in decoder.feed(data):
            assert isinstance(message, EngineReady)
            return message, fds[0]
        data = connection.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("the engine closed the connection")


def _refusal(message: RequestRefused) -> ServingError:
    if message.reason == "overloaded":
        return Overloaded(message.message, retry_after_s=RETRY_AFTER_S)
    if message.reason == "context_length_exceeded":
        return ContextLengthExceeded(message.message, field="messages")
    if message.reason == "invalid_request":
        return InvalidRequest(message.message)
    return ModelError(message.message)


def _gone() -> Unavailable:
    return Unavailable("the engine is not running", retry_after_s=RETRY_AFTER_S)


def _stalled() -> Unavailable:
    return Unavailable("the engine makes no progress", retry_after_s=RETRY_AFTER_S)
