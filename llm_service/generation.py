"""The life of one request: pictures laid out, prompt built, engine fed with tiles, tokens made text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch

from llm_service.answer_parser import AnswerParser
from llm_service.choice import Choice, ChoiceDelta, ChoiceFinished
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.engine_client import EngineClient, EngineRequest, Event, PromptInput
from llm_service.generation_clock import GenerationClock, GenerationTimings
from llm_service.generation_input import GenerationInput, hash_media
from llm_service.grammar_checks import GrammarChecks
from llm_service.messages import PromptTile, RequestAccepted, SequenceOutput, SlotGrant
from llm_service.picture import PartGrid, Picture, PictureLayout, TileId
from llm_service.prompt import PlaceholderRange, PromptBuilder, PromptLayout, TextPart
from llm_service.templates import Asks
from llm_service.tokenizer import Tokenizer
from llm_service.tools import ToolChoice
from protos.errors import ContextLengthExceeded, DeadlineExceeded, ModelError, ServingError

# Some 50 ms of tokenization.
LONG_TEXT_CHARS = 1 << 17

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationStarted:
    prompt_tokens: int
    media: tuple[tuple[PartGrid, ...], ...] = ()  # of each medium its parts


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
    grammars: GrammarChecks
    request_timeout_s: float
    # One at a time: a few texts of megabytes must not take all threads from the prompts of others.
    long_texts: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "long-texts"))


class Generation:
    """One request.  Tokens become text as they arrive; what nobody has taken yet is joined.

    Whoever calls `start` calls `close`, however the request ends: that frees everything within one step.
    """

    def __init__(self, request: GenerationInput, backends: Backends) -> None:
        self._request = request
        self._backends = backends
        self._clock = GenerationClock()
        self._encoding: Encoding | None = None
        self._engine_request: EngineRequest | None = None
        self._tile_ids: list[TileId] = []  # by tile index of the engine
        self._grants: dict[TileId, SlotGrant] = {}
        self._cached_tokens = 0
        self._opens_thinking = False
        self._deadline: asyncio.TimerHandle | None = None
        self._on_change: Callable[[], None] | None = None
        self._prompt_tokens = self._visual_tokens = 0
        self._grids: tuple[tuple[PartGrid, ...], ...] = ()
        self._started: GenerationStarted | None = None  # not taken yet
        self._choices: list[Choice] = []
        self._touched: dict[int, Choice] = {}  # with something that nobody has taken yet
        self._num_reported = 0
        self.error: ServingError | None = None  # behind what `take` gives
        self.is_over = False  # nothing comes any more

    async def run(self) -> AsyncGenerator[GenerationEvent]:
        """All of it: events as they come; leaving frees everything.

        Raises:
            ServingError: before or between events, when the request cannot go on.
        """
        changed = asyncio.Event()
        try:
            await self.start(changed.set)
            while not self.is_over:
                await changed.wait()
                changed.clear()
                for event in self.take():
                    yield event
                if self.error is not None:
                    raise self.error
        finally:
            await self.close()

    async def start(self, on_change: Callable[[], None]) -> None:
        """Return when the engine has been asked; from then on `on_change` says that there is news.

        Raises:
            ServingError: the request is refused before the engine sees it.
        """
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._backends.request_timeout_s, self._expire)
        grammar = await self._grammar()
        prompt = await self._prompt_input(grammar)
        params = prompt.params
        stops = frozenset(prompt.stop_token_ids)
        tokenizer = self._backends.tokenizer
        self._choices = [Choice(index, params, stops, tokenizer, self._parser()) for index in range(params.n)]
        self._prompt_tokens = len(prompt.token_ids)
        self._visual_tokens = sum(tile.num_tokens for tile in prompt.tiles)
        self._on_change = on_change
        self._engine_request = self._backends.engine.submit(prompt, self._fetch, self._on_event)
        if self.error is not None:  # the deadline has passed meanwhile
            on_change()

    def take(self) -> list[GenerationEvent]:
        """What has come since the last call; a look at `error` belongs to it."""
        events: list[GenerationEvent] = []
        if self._started is not None:
            events.append(self._started)
            self._started = None
        for choice in self._touched.values():
            delta = choice.take_delta()
            if delta is not None:
                events.append(delta)
            if choice.finished is not None:
                events.append(choice.finished)
                self._num_reported += 1
        self._touched.clear()
        if self._choices and self._num_reported == len(self._choices):
            events.append(self._usage())
            self.is_over, self.error = True, None
        return events

    async def close(self) -> None:
        """The first part, which frees blocks and slots, is done before this waits for anything."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._on_change = None
        # In this order: no slot may be written once the engine has been told to forget them.
        if self._engine_request is not None:
            self._engine_request.close()
        if self._encoding is not None:
            await self._encoding.close()
            self._encoding = None  # it knows us too: the pictures must not wait for the collector

    def _on_event(self, event: Event) -> None:
        try:
            if isinstance(event, SequenceOutput):
                self._push(event)
            elif isinstance(event, RequestAccepted):
                self._started = GenerationStarted(self._prompt_tokens, self._grids)
            else:
                assert isinstance(event, ServingError)
                self.error = self.error or event
        except Exception:  # a bug with one request's tokens must not end the others
            log.exception("unexpected error with the tokens of a request")
            self.error = ModelError("internal error; see the server's log")
        if self._on_change is not None:
            self._on_change()

    def _push(self, output: SequenceOutput) -> None:
        choice = self._choices[output.index]
        if choice.finished is not None:
            return
        if self._clock.note_token(output):
            self._cached_tokens = output.num_cached_tokens
        if self._encoding is not None:
            self._encoding.finish()  # also after a preemption that had asked for tiles again
        choice.push(output)
        self._touched[output.index] = choice
        if choice.stopped_by_string:
            assert self._engine_request is not None
            self._engine_request.abort_choice(choice.index)

    def _expire(self) -> None:
        self._on_event(DeadlineExceeded("the request took longer than the server allows"))

    def _usage(self) -> GenerationUsage:
        return GenerationUsage(
            prompt_tokens=self._prompt_tokens,
            visual_tokens=self._visual_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(choice.num_output_tokens for choice in self._choices),
            timings=self._clock.timings(self._encode_ns),
        )

    @property
    def _encode_ns(self) -> int:
        """First grant to last tile."""
        if self._encoding is None:
            return 0
        return max(self._encoding.last_tile_ns - self._encoding.first_grant_ns, 0)

    def _fetch(self, grant: SlotGrant) -> None:
        assert self._encoding is not None
        tile = self._tile_ids[grant.tile_index]
        self._grants[tile] = grant
        self._encoding.want(tile)

    def _write(self, tile: TileId, embeds: torch.Tensor) -> None:
        assert self._engine_request is not None
        self._engine_request.write_tile(self._grants[tile], embeds)

    def _announce(self, tile: TileId) -> None:
        assert self._engine_request is not None
        self._engine_request.announce_tile(self._grants.pop(tile))

    def _fail(self, error: ServingError) -> None:
        error.field = self._own_field(error.field)
        if self._engine_request is None:
            self.error = self.error or error  # while the prompt of known lengths is made
        else:
            self._engine_request.post(error)

    async def _grammar(self) -> str:
        request, grammars = self._request, self._backends.grammars
        if request.response_format is not None:
            return await grammars.grammar(request.response_format, bool(request.thinking))
        if request.tools is not None:
            form = self._backends.prompts.call_form
            return await grammars.call_grammar(request.tools, form, bool(request.thinking))
        return ""

    def _parser(self) -> AnswerParser | None:
        use, thinking = self._request.tools, self._request.thinking
        has_tools = use is not None and bool(use.shown)
        if not has_tools and thinking is None:
            return None
        is_single = use is not None and (use.single_call or use.choice is ToolChoice.NAMED)
        return AnswerParser(
            reasoning=thinking is not None,
            tools=has_tools,
            in_reasoning=thinking is not None and self._opens_thinking,
            max_calls=int(is_single),
            form=self._backends.prompts.call_form,
            names=() if use is None else use.allowed,
        )

    async def _prompt_input(self, grammar: str) -> PromptInput:
        request, prompts, encoders = self._request, self._backends.prompts, self._backends.encoders
        text, pictures = await self._text_and_pictures()
        layouts = await self._layout(pictures) if pictures else []
        if any(layout.part_tiles for layout in layouts):  # only now it is known how many frames there are
            text = await self._text([len(layout.num_tiles_of_parts) for layout in layouts])
            if self.error is not None:  # meanwhile
                raise self.error
        self._grids = tuple(layout.grids for layout in layouts)
        # No await from here to `submit`: the encoder's errors go to the engine request.
        prompt = text.expand([tokens for layout in layouts for tokens in layout.tokens_per_part])
        self._clock.note_layout()
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
            takes_turns=encoders.take_turns(self._backends.engine.ready.gpu_uuid, len(tiles)),
            arrival_tokens=encoders.first_batch_tiles * max((tile.num_tokens for tile in tiles), default=0),
            grammar=grammar,
        )

    async def _text_and_pictures(self) -> tuple[PromptLayout, list[Picture]]:
        """At the same time; the text refuses a bad conversation before an encoder is bothered."""
        if not self._request.media:
            return await self._text(), []
        hashing = asyncio.create_task(self._pictures())
        try:
            text = await self._text()
            return text, await hashing
        finally:
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)

    async def _text(self, num_parts: Sequence[int] | None = None) -> PromptLayout:
        prompts = self._backends.prompts
        if self._request.messages:
            # Megabytes of text take seconds: other requests' tokens must not wait for them.
            executor = self._backends.long_texts if self._has_long_text() else None
            loop = asyncio.get_running_loop()
            asks = self._asks()
            text = await loop.run_in_executor(
                executor, prompts.layout, self._request.messages, num_parts, asks
            )
            self._opens_thinking = text.opens_thinking
        else:
            text = PromptLayout(self._request.prompt_token_ids, [], prompts.context_id)
        self._max_tokens(text.num_text_tokens)
        return text

    def _asks(self) -> Asks:
        use = self._request.tools
        shown = () if use is None else use.shown
        return Asks(tuple(tool.definition() for tool in shown), self._request.thinking)

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
        return await asyncio.to_thread(hash_media, self._request.media, fingerprint)

    async def _layout(self, pictures: list[Picture]) -> list[PictureLayout]:
        self._encoding = Encoding(
            pictures,
            self._backends.encoders,
            self._backends.layouts,
            self._backends.engine.ready.hidden_size,
            self._request.metadata,
            self._request.cache_salt,
            self._request.priority,
            write=self._write,
            on_tile=self._announce,
            on_error=self._fail,
        )
        try:
            return await self._encoding.layout()
        except ServingError as error:
            error.field = self._own_field(error.field)
            raise

    def _own_field(self, field: str | None) -> str | None:
        """The encoder counts media, the caller's request has messages and parts; it knows no other field."""
        for number, medium in enumerate(self._request.media):
            prefix = f"media[{number}]"
            if field is not None and field.startswith(prefix):
                return medium.field + field.removeprefix(prefix)
        return "messages" if field == "media" else None

    def _tiles(
        self,
        placeholders: Sequence[PlaceholderRange],
        pictures: Sequence[Picture],
        layouts: Sequence[PictureLayout],
    ) -> Iterator[PromptTile]:
        salt = len(self._request.cache_salt).to_bytes(4, "little") + self._request.cache_salt
        places = iter(placeholders)
        for medium, (picture, layout) in enumerate(zip(pictures, layouts, strict=True)):
            tiles = enumerate(layout.tokens_per_tile)
            content = layout.fetched_hash or picture.content_hash
            for num_tiles in layout.num_tiles_of_parts:
                offset = next(places).offset
                for tile, num_tokens in islice(tiles, num_tiles):
                    self._tile_ids.append(TileId(medium, tile))
                    key = salt + content + tile.to_bytes(4, "little")
                    yield PromptTile(key, offset, num_tokens)
                    offset += num_tokens
