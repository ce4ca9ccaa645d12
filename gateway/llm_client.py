"""Calls to the language-model services: which one to ask, with what deadline, and how failures read.

Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc

from gateway.answer import Answer
from gateway.events import Event
from gateway.model_info import ModelInfo
from gateway.session import Session
from gateway.translate import model_info_from_proto
from protos import language_model_pb2, language_model_pb2_grpc
from protos.channel import ClientTlsConfig, open_channel
from protos.errors import DeadlineExceeded, ModelError, ServingError, Unavailable
from protos.request_context import Metadata
from protos.statuses import carries_our_details, error_from_rpc

# A service that was unreachable gets no new requests for this long while others are there.
AVOID_S = 1.0
# What a service says about itself is asked again after this time.
MODEL_TTL_S = 10.0

log = logging.getLogger(__name__)


# Round robin chooses a replica for a stream, not for a request: so many streams spread over those of a name.
SESSIONS_PER_NAME = 8


@dataclass
class _Target:
    """One session with a service."""

    address: str
    channel: grpc.aio.Channel
    stub: language_model_pb2_grpc.LanguageModelStub
    session: Session | None = None
    in_flight: int = 0
    last_pick: int = 0
    avoid_until: float = field(default=0.0)  # time.monotonic()


class LLMClient:
    """A pool of language-model services that serve the same model.  Make it inside a running event loop."""

    def __init__(
        self, targets: Sequence[str], tls: ClientTlsConfig | None = None, *, model_timeout_s: float = 2.0
    ) -> None:
        self._targets = [target for address in targets for target in _open(address, tls)]
        self._model_timeout_s = model_timeout_s
        self._picks = itertools.count(1)
        self._model: ModelInfo | None = None
        self._model_until = 0.0  # time.monotonic()
        self._refresh = asyncio.Lock()

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
        """What each service says now, or why it does not."""
        return await asyncio.gather(*(self._ask(target) for target in self._services()))

    async def generate(
        self,
        request: language_model_pb2.GenerateRequest,
        *,
        metadata: Metadata,
        timeout_s: float,
        idle_s: float = 3600.0,
    ) -> AsyncGenerator[list[Event], None]:
        """Events of one answer, all that are there at once; none after `idle_s` seconds of silence.

        Closing the iterator cancels the request at once.

        Raises:
            ServingError: as the service said it, behind the events before it.
        """
        target = self._pick()
        target.in_flight += 1
        answer, session = Answer(idle_s), self._session(target)
        request_id = session.ask(request, metadata, answer)
        too_late = DeadlineExceeded("The request took longer than its time limit.")
        deadline = asyncio.get_running_loop().call_later(timeout_s, answer.fail, too_late)
        try:
            while answer.has_more:
                yield await answer.next()
        except Unavailable:
            self._avoid(target)
            raise
        finally:
            deadline.cancel()
            answer.close()
            session.leave(request_id)
            target.in_flight -= 1

    async def close(self) -> None:
        await asyncio.gather(*(target.session.close() for target in self._targets if target.session))
        await asyncio.gather(*(target.channel.close() for target in self._services()))

    def _services(self) -> list[_Target]:
        """One target of each address."""
        return list({id(target.channel): target for target in self._targets}.values())

    def _session(self, target: _Target) -> Session:
        if target.session is None or target.session.has_ended:
            target.session = Session(target.stub, partial(self._failure, target))
        return target.session

    def _avoid(self, target: _Target) -> None:
        target.avoid_until = time.monotonic() + AVOID_S
        self._model_until = 0.0

    def _pick(self) -> _Target:
        """The least busy of those that were reachable, in turn among equals."""
        now = time.monotonic()
        reachable = [target for target in self._targets if target.avoid_until <= now] or self._targets
        target = min(reachable, key=lambda target: (target.in_flight, target.last_pick))
        target.last_pick = next(self._picks)
        return target

    async def _ask_or_keep(self, known: ModelInfo | None) -> ModelInfo:
        answers = await self.models()
        models = [answer for answer in answers if isinstance(answer, ModelInfo)]
        if models:
            return models[0]
        if known is not None:
            return known
        raise next(answer for answer in answers if isinstance(answer, ServingError))

    async def _ask(self, target: _Target) -> ModelInfo | ServingError:
        request = language_model_pb2.GetLanguageModelRequest()
        try:
            return model_info_from_proto(await target.stub.GetModel(request, timeout=self._model_timeout_s))
        except grpc.RpcError as error:
            failure = self._failure(target, error)
            if isinstance(failure, DeadlineExceeded):
                return Unavailable("The language model does not answer.")
            return failure

    def _failure(self, target: _Target, error: grpc.RpcError) -> ServingError:
        failure = error_from_rpc(error)
        if isinstance(failure, Unavailable):
            self._avoid(target)
        if carries_our_details(error):
            return failure
        # Without our details the text is gRPC's own, which names addresses.
        log.warning("call to %s failed: %s %s", target.address, error.code().name, error.details())
        return type(failure)(_FOREIGN.get(type(failure), "The language model refused the request."))


_FOREIGN: dict[type[ServingError], str] = {
    Unavailable: "The language model is not reachable.",
    DeadlineExceeded: "The request took longer than its time limit.",
    ModelError: "The language model failed.",
}


def _open(address: str, tls: ClientTlsConfig | None) -> list[_Target]:
    channel = open_channel(address, tls)
    stub = language_model_pb2_grpc.LanguageModelStub(channel)
    num_sessions = SESSIONS_PER_NAME if address.startswith("dns:") else 1
    return [_Target(address, channel, stub) for _ in range(num_sessions)]
