"""Calls to the language-model services: which one is asked, with what deadline, and who is asked instead.

Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from gateway.answer import Answer
from gateway.conversation import Turn
from gateway.events import Delta, Event, Restarted, Started
from gateway.llm_target import LLMTarget
from gateway.model_info import ModelInfo
from gateway.translate import detokenize_request, tokenize_request, tokenize_turns_request
from protos import language_model_pb2
from protos.channel import ClientTlsConfig
from protos.directory import Lookup, Replica, look_up
from protos.errors import DeadlineExceeded, Overloaded, ServingError, Unavailable
from protos.placement import choose
from protos.replicas import Replicas
from protos.request_context import Metadata

# What a service says about itself is asked again after this time.
MODEL_TTL_S = 10.0
# Services that one request is sent to before its error is believed: it may be what kills them.
MAX_ATTEMPTS = 3
# Sequences that a service may have whatever the others have: together they take little more time than one,
# and a conversation finds its KV cache (docs/benchmarks/placement.md).
FREE_SEQUENCES = 8

T = TypeVar("T")

log = logging.getLogger(__name__)


class LLMClient:
    """A pool of language-model services that serve the same model.  Make it inside a running event loop."""

    def __init__(
        self,
        targets: Sequence[str],
        tls: ClientTlsConfig | None = None,
        *,
        model_timeout_s: float = 2.0,
        lookup: Lookup = look_up,
    ) -> None:
        """`lookup` resolves names."""
        self._tls = tls
        self._model_timeout_s = model_timeout_s
        self._replicas = Replicas("language model", targets, self._connect, lookup)
        self._model: ModelInfo | None = None
        self._model_until = 0.0  # time.monotonic()
        self._refresh = asyncio.Lock()

    def start(self) -> None:
        """Notice from now on which services there are, which of them answer, and how busy they are."""
        self._replicas.start()

    async def close(self) -> None:
        await self._replicas.close()

    @property
    def _targets(self) -> dict[str, LLMTarget]:
        return self._replicas.connections

    def _connect(self, replica: Replica) -> LLMTarget:
        return LLMTarget(replica, self._tls, self._model_timeout_s)

    async def model(self) -> ModelInfo:
        """What is served, at most MODEL_TTL_S old unless no service answers.

        Raises:
            ServingError: no service has answered yet, and none does now.
        """
        if self._model is not None and time.monotonic() < self._model_until:
            return self._model
        async with self._refresh:
            if self._model is None or time.monotonic() >= self._model_until:
                self._model = await self._ask_or_keep(self._model)
                self._model_until = time.monotonic() + MODEL_TTL_S
        return self._model

    async def models(self) -> list[ModelInfo | ServingError]:
        """What each service says now, or why it does not; at least one answer."""
        if not self._targets:
            await self._replicas.resolve()
        asked = [self._ask(target) for target in self._targets.values()]
        return await asyncio.gather(*asked) or [_nobody()]

    async def tokenize(self, text: str | Sequence[Turn]) -> list[int]:
        """Ids of a text as it is, or of a conversation without media.

        Raises:
            ServingError: as the service said it.
        """
        request = tokenize_request(text) if isinstance(text, str) else tokenize_turns_request(text)
        return await self._anywhere(lambda target: target.tokenize(request))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; raises ServingError as the service said it."""
        request = detokenize_request(tokens)
        return await self._anywhere(lambda target: target.detokenize(request))

    async def _anywhere(self, call: Callable[[LLMTarget], Awaitable[T]]) -> T:
        """What the first service that is there answers: all have the same tokenizer."""
        tried: dict[str, ServingError] = {}
        nothing = language_model_pb2.GenerateRequest()
        while True:
            target = await self._choose(b"", nothing, tried)
            try:
                with _loading(target, 1):
                    return await call(target)
            except Unavailable as error:
                tried[target.address] = error
                self._note(target, error)
                if not self._may_retry(tried):
                    raise

    async def generate(
        self,
        request: language_model_pb2.GenerateRequest,
        *,
        key: bytes,
        metadata: Metadata,
        timeout_s: float,
        idle_s: float = 3600.0,
        is_kept: bool = False,
        uploads: Sequence[bytes] = (),
    ) -> AsyncGenerator[list[Event], None]:
        """Events of one answer, all that are there at once; none after `idle_s` seconds of silence.

        Requests with the same `key` go to the same service as long as that is not much busier than others.
        When it is lost before it has said anything, or while the caller keeps all that it says to himself
        (`is_kept`), another is asked; `Restarted` says that what came before is void.  `uploads` are media
        that the request names; they go to the service before it.  Closing the iterator cancels the request at
        once.

        Raises:
            ServingError: as the service said it, behind the events before it.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        tried: dict[str, ServingError] = {}
        target, has_begun = await self._choose(key, request, ()), False
        while True:
            try:
                with _loading(target, _num_sequences(request)):
                    for data in uploads:
                        await target.upload(data, request.cache_salt, metadata, deadline_s)
                    with _asking(target, request, metadata, Answer(idle_s), deadline_s) as answer:
                        while answer.has_more:
                            batch = await answer.next()
                            has_begun = has_begun or any(map(_is_seen, batch))
                            yield batch
                return
            except (Unavailable, Overloaded) as error:
                tried[target.address] = error
                self._note(target, error)
                if (has_begun and not is_kept) or not self._may_retry(tried):
                    raise _most_telling(tried) from None
            log.warning("asking another language model than %s", target.address)
            target = await self._choose(key, request, tried)
            has_begun = False
            yield [Restarted()]

    def _may_retry(self, tried: Collection[str]) -> bool:
        return len(tried) < MAX_ATTEMPTS and not self._targets.keys() <= set(tried)

    def _note(self, target: LLMTarget, error: ServingError) -> None:
        """One that is only full is there."""
        if isinstance(error, Unavailable):
            target.avoid()
            self._replicas.hurry()
            self._model_until = 0.0

    async def _choose(
        self, key: bytes, request: language_model_pb2.GenerateRequest, tried: Collection[str]
    ) -> LLMTarget:
        """By key and load among those that answer; any of them when none does."""
        if not self._targets:
            await self._replicas.resolve()
        left = [target for address, target in self._targets.items() if address not in tried]
        if not left:
            raise _nobody()
        there = [target for target in left if not target.is_avoided] or left
        loads = {target.address: target.load.total for target in there}
        return self._targets[choose(key, loads, _num_sequences(request), free=FREE_SEQUENCES)]

    async def _ask_or_keep(self, known: ModelInfo | None) -> ModelInfo:
        answers = await self.models()
        models = [answer for answer in answers if isinstance(answer, ModelInfo)]
        if models:
            return models[0]
        if known is not None:
            return known
        raise next(answer for answer in answers if isinstance(answer, ServingError))

    async def _ask(self, target: LLMTarget) -> ModelInfo | ServingError:
        try:
            return await target.model()
        except ServingError as error:
            return error


@contextmanager
def _loading(target: LLMTarget, num_sequences: int) -> Iterator[None]:
    """During uploads and tokenization, too: one whose address has gone is not closed meanwhile."""
    target.load.own += num_sequences
    try:
        yield
    finally:
        target.load.own -= num_sequences


@contextmanager
def _asking(
    target: LLMTarget,
    request: language_model_pb2.GenerateRequest,
    metadata: Metadata,
    answer: Answer,
    deadline_s: float,
) -> Iterator[Answer]:
    """The answer while it is asked for; leaving cancels it.  `deadline_s` is the event loop's time."""
    session = target.session()
    request_id = session.ask(request, metadata, answer)
    too_late = DeadlineExceeded("The request took longer than its time limit.")
    deadline = asyncio.get_running_loop().call_at(deadline_s, answer.fail, too_late)
    try:
        yield answer
    finally:
        deadline.cancel()
        answer.close()
        session.leave(request_id)


def _is_seen(event: Event) -> bool:
    """It makes bytes that the client gets."""
    if type(event) is Delta:
        return not event.is_empty
    return type(event) is not Started


def _num_sequences(request: language_model_pb2.GenerateRequest) -> int:
    return max(1, request.sampling.n)


def _most_telling(failures: dict[str, ServingError]) -> ServingError:
    """A service that is full is there, and knows when to come back; else what was heard last."""
    full = [error for error in failures.values() if isinstance(error, Overloaded)]
    return [*failures.values(), *full][-1]


def _nobody() -> ServingError:
    return Unavailable("The language model is not reachable.")
