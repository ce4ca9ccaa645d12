"""The life of one request: pictures laid out, prompt built, engine fed with tiles, tokens made text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

import torch

from llm_service.choice import Choice, ChoiceDelta, ChoiceFinished
from llm_service.encode_stream import Picture, PictureLayout, TileId
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.engine_client import EngineClient, EngineRequest, Event, PromptInput
from llm_service.messages import PromptTile, RequestAccepted, SequenceOutput, SlotGrant
from llm_service.prompt import Message, PlaceholderRange, PromptBuilder, PromptLayout, TextPart
from llm_service.sampling_params import SamplingParams
from llm_service.tokenizer import Tokenizer
from protos.errors import ContextLengthExceeded, DeadlineExceeded, ServingError
from protos.fingerprint import content_hash
from protos.request_context import Metadata

# Some 50 ms of tokenization.
LONG_TEXT_CHARS = 1 << 17


@dataclass(frozen=True)
class ImageInput:
    """A picture with its tiling options resolved; `field` is its path in the request, for errors."""

    data: bytes
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    field: str


@dataclass(frozen=True)
class GenerationInput:
    messages: list[Message]  # empty when prompt_token_ids are given
    prompt_token_ids: list[int]
    images: list[ImageInput]  # in the order of the messages' ImageParts
    params: SamplingParams
    priority: int
    cache_salt: bytes
    metadata: Metadata  # request id and trace context, for the encoder


@dataclass(frozen=True)
class GenerationStarted:
    prompt_tokens: int


@dataclass(frozen=True)
class GenerationTimings:
    """Nanoseconds; see GenerateTimings of the contract."""

    layout_ns: int
    encode_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    total_ns: int


@dataclass(frozen=True)
class GenerationUsage:
    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int
    completion_tokens: int
    timings: GenerationTimings


GenerationEvent = GenerationStarted | ChoiceDelta | ChoiceFinished | GenerationUsage


@dataclass(frozen=True)
class Backends:
    """What all requests of a front end share."""

    engine: EngineClient
    encoders: EncoderPool
    layouts: LayoutCache
    tokenizer: Tokenizer
    prompts: PromptBuilder
    request_timeout_s: float
    # One at a time: a few texts of megabytes must not take all threads from the prompts of others.
    long_texts: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "long-texts"))


class Generation:
    """One request.  `run` yields its events; leaving it, however, frees everything within one step."""

    def __init__(self, request: GenerationInput, backends: Backends) -> None:
        self._request = request
        self._backends = backends
        self._clock = _Clock()
        self._encoding: Encoding | None = None
        self._engine_request: EngineRequest | None = None
        self._tile_ids: list[TileId] = []  # by tile index of the engine
        self._grants: dict[TileId, SlotGrant] = {}
        self._cached_tokens = 0
        self._deadline_s = asyncio.get_running_loop().time() + backends.request_timeout_s

    async def run(self) -> AsyncGenerator[GenerationEvent]:
        """Raises ServingError, before or between events, when the request cannot go on."""
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield event
        finally:
            # In this order: no slot may be written once the engine has been told to forget them.
            if self._engine_request is not None:
                self._engine_request.close()
            if self._encoding is not None:
                await self._encoding.close()
                self._encoding = None  # it knows us too: the pictures must not wait for the collector

    async def _events(self) -> AsyncGenerator[GenerationEvent]:
        prompt = await self._prompt_input()
        request = self._backends.engine.submit(prompt, on_grant=self._fetch)
        self._engine_request = request
        accepted = await self._next_event(request)
        assert isinstance(accepted, RequestAccepted)
        yield GenerationStarted(len(prompt.token_ids))
        stops = frozenset(prompt.stop_token_ids)
        tokenizer = self._backends.tokenizer
        choices = [Choice(index, prompt.params, stops, tokenizer) for index in range(prompt.params.n)]
        async with aclosing(self._choice_events(request, choices)) as events:
            async for event in events:
                yield event
        yield GenerationUsage(
            prompt_tokens=len(prompt.token_ids),
            visual_tokens=sum(tile.num_tokens for tile in prompt.tiles),
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(choice.num_output_tokens for choice in choices),
            timings=self._clock.timings(self._encoding),
        )

    async def _choice_events(
        self, request: EngineRequest, choices: Sequence[Choice]
    ) -> AsyncGenerator[ChoiceDelta | ChoiceFinished]:
        """Deltas of all choices; what a slow client has not taken yet is joined into one."""
        reported = 0
        while reported < len(choices):
            touched = await self._next_choices(request, choices)
            for choice in touched:
                delta = choice.take_delta()
                if delta is not None:
                    yield delta
                if choice.finished is not None:
                    reported += 1
                    yield choice.finished

    async def _next_choices(self, request: EngineRequest, choices: Sequence[Choice]) -> list[Choice]:
        """Handle the engine's events until none is left; returns the choices that got tokens."""
        touched: dict[int, Choice] = {}
        while not touched or request.has_event():
            event = await self._next_event(request)
            assert isinstance(event, SequenceOutput)
            choice = choices[event.index]
            if choice.finished is None:
                self._push(choice, event, request)
                touched[event.index] = choice
        return list(touched.values())

    async def _next_event(self, request: EngineRequest) -> Event:
        """No timeout spans a yield: it would cancel whoever consumes the events instead."""
        try:
            async with asyncio.timeout_at(self._deadline_s):
                return await request.next_event()
        except TimeoutError:
            raise DeadlineExceeded("the request took longer than the server allows") from None

    def _push(self, choice: Choice, output: SequenceOutput, request: EngineRequest) -> None:
        if self._clock.note_token(output.scheduled_ns):
            self._cached_tokens = output.num_cached_tokens
        if self._encoding is not None:
            self._encoding.finish()  # also after a preemption that had asked for tiles again
        choice.push(output)
        if choice.stopped_by_string:
            request.abort_choice(choice.index)

    def _fetch(self, grant: SlotGrant) -> None:
        assert self._encoding is not None
        tile = self._tile_ids[grant.tile_index]
        self._grants[tile] = grant
        self._encoding.want(tile)

    def _store(self, tile: TileId, embeds: torch.Tensor) -> None:
        assert self._engine_request is not None
        self._engine_request.store_tile(self._grants.pop(tile), embeds)

    def _fail(self, error: ServingError) -> None:
        assert self._engine_request is not None
        error.field = self._own_field(error.field)
        self._engine_request.post(error)

    async def _prompt_input(self) -> PromptInput:
        request, prompts = self._request, self._backends.prompts
        text = await self._text()  # refuses a bad conversation before an encoder is bothered
        pictures: list[Picture] = []
        layouts: list[PictureLayout] = []
        if request.images:
            pictures = await self._pictures()
            layouts = await self._layout(pictures)
        # No await from here to `submit`: the encoder's errors go to the engine request.
        prompt = text.expand([layout.num_tokens for layout in layouts])
        self._clock.laid_out_ns = time.monotonic_ns()
        tiles = list(self._tiles(prompt.placeholders, pictures, layouts))
        eos = () if request.params.ignore_eos else prompts.default_stop_token_ids
        return PromptInput(
            token_ids=prompt.token_ids,
            tiles=tiles,
            params=request.params,
            stop_token_ids=sorted({*eos, *request.params.stop_token_ids}),
            max_tokens=self._max_tokens(len(prompt.token_ids)),
            priority=request.priority,
            cache_salt=request.cache_salt,
        )

    async def _text(self) -> PromptLayout:
        prompts = self._backends.prompts
        if self._request.messages:
            # Megabytes of text take seconds: other requests' tokens must not wait for them.
            executor = self._backends.long_texts if self._has_long_text() else None
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(executor, prompts.layout, self._request.messages)
        else:
            text = PromptLayout(self._request.prompt_token_ids, [], prompts.context_id)
        self._max_tokens(text.num_text_tokens)
        return text

    def _has_long_text(self) -> bool:
        parts = (part for message in self._request.messages for part in message.parts)
        return sum(len(part.text) for part in parts if isinstance(part, TextPart)) > LONG_TEXT_CHARS

    def _max_tokens(self, num_prompt_tokens: int) -> int:
        limit = self._backends.engine.ready.max_model_len
        if num_prompt_tokens >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens with its pictures; "
                f"the context holds {limit}, completion included",
                field="messages" if self._request.messages else "prompt_token_ids",
            )
        left = limit - num_prompt_tokens
        return min(self._request.params.max_tokens or left, left)

    async def _pictures(self) -> list[Picture]:
        fingerprint = await self._backends.encoders.fingerprint()
        return await asyncio.to_thread(_hash_pictures, self._request.images, fingerprint)

    async def _layout(self, pictures: list[Picture]) -> list[PictureLayout]:
        self._encoding = Encoding(
            pictures,
            self._backends.encoders,
            self._backends.layouts,
            self._backends.engine.ready.hidden_size,
            self._request.metadata,
            self._request.cache_salt,
            self._request.priority,
            on_tile=self._store,
            on_error=self._fail,
        )
        try:
            return await self._encoding.layout()
        except ServingError as error:
            error.field = self._own_field(error.field)
            raise

    def _own_field(self, field: str | None) -> str | None:
        """The encoder counts media, the caller's request has messages and parts; it knows no other field."""
        for medium, image in enumerate(self._request.images):
            prefix = f"media[{medium}]"
            if field is not None and field.startswith(prefix):
                return image.field + field.removeprefix(prefix)
        return "messages" if field == "media" else None

    def _tiles(
        self,
        placeholders: Sequence[PlaceholderRange],
        pictures: Sequence[Picture],
        layouts: Sequence[PictureLayout],
    ) -> Iterator[PromptTile]:
        salt = len(self._request.cache_salt).to_bytes(4, "little") + self._request.cache_salt
        media = zip(placeholders, pictures, layouts, strict=True)
        for medium, (placeholder, picture, layout) in enumerate(media):
            offset = placeholder.offset
            for tile, num_tokens in enumerate(layout.tokens_per_tile):
                self._tile_ids.append(TileId(medium, tile))
                key = salt + picture.content_hash + tile.to_bytes(4, "little")
                yield PromptTile(key, offset, num_tokens)
                offset += num_tokens


class _Clock:
    def __init__(self) -> None:
        self._received_ns = time.monotonic_ns()
        self.laid_out_ns = self._received_ns
        self._scheduled_ns = 0
        self._first_token_ns = 0
        self._last_token_ns = 0

    def note_token(self, scheduled_ns: int) -> bool:
        """True for the request's first token."""
        self._last_token_ns = time.monotonic_ns()
        if self._first_token_ns:
            return False
        self._first_token_ns = self._last_token_ns
        self._scheduled_ns = scheduled_ns
        return True

    def timings(self, encoding: Encoding | None) -> GenerationTimings:
        encode_ns = encoding.last_tile_ns - encoding.first_grant_ns if encoding is not None else 0
        return GenerationTimings(
            layout_ns=self.laid_out_ns - self._received_ns,
            encode_ns=max(encode_ns, 0),
            queue_ns=max(self._scheduled_ns - self.laid_out_ns, 0),
            prefill_ns=self._first_token_ns - self._scheduled_ns,
            decode_ns=self._last_token_ns - self._first_token_ns,
            total_ns=self._last_token_ns - self._received_ns,
        )


def _hash_pictures(images: Sequence[ImageInput], fingerprint: bytes) -> list[Picture]:
    return [
        Picture(
            image.data,
            image.min_tiles,
            image.max_tiles,
            image.use_thumbnail,
            content_hash(image.data, image.min_tiles, image.max_tiles, image.use_thumbnail, fingerprint),
            fingerprint,
        )
        for image in images
    ]
