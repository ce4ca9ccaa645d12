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

import grpc

from gateway.events import Event
from gateway.model_info import ModelInfo
from gateway.translate import event_from_proto, model_info_from_proto
from protos import language_model_pb2, language_model_pb2_grpc
from protos.channel import ClientTlsConfig, open_channel
from protos.errors import Cancelled, DeadlineExceeded, ModelError, ServingError, Unavailable
from protos.request_context import Metadata
from protos.statuses import carries_our_details, error_from_rpc

# A service that was unreachable gets no new requests for this long while others are there.
AVOID_S = 1.0
# What a service says about itself is asked again after this time.
MODEL_TTL_S = 10.0

log = logging.getLogger(__name__)


@dataclass
class _Target:
    address: str
    channel: grpc.aio.Channel
    stub: language_model_pb2_grpc.LanguageModelStub
    in_flight: int = 0
    last_pick: int = 0
    avoid_until: float = field(default=0.0)  # time.monotonic()


class LLMClient:
    """A pool of language-model services that serve the same model.  Make it inside a running event loop."""

    def __init__(
        self, targets: Sequence[str], tls: ClientTlsConfig | None = None, *, model_timeout_s: float = 2.0
    ) -> None:
        self._targets = [_open(address, tls) for address in targets]
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
        return await asyncio.gather(*(self._ask(target) for target in self._targets))

    async def generate(
        self, request: language_model_pb2.GenerateRequest, *, metadata: Metadata, timeout_s: float
    ) -> AsyncGenerator[Event, None]:
        """Events of one answer.  Closing the iterator cancels the call at once.

        Raises:
            ServingError: as the service said it.
        """
        target = self._pick()
        target.in_flight += 1
        call = target.stub.Generate(request, timeout=timeout_s, metadata=metadata)
        try:
            async for message in call:
                yield event_from_proto(message)
        except grpc.RpcError as error:
            raise self._failure(target, error) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also when the service ended the call with CANCELLED.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("The language model cancelled the request.") from None
        finally:
            call.cancel()
            target.in_flight -= 1

    async def close(self) -> None:
        await asyncio.gather(*(target.channel.close() for target in self._targets))

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
            target.avoid_until = time.monotonic() + AVOID_S
            self._model_until = 0.0
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


def _open(address: str, tls: ClientTlsConfig | None) -> _Target:
    channel = open_channel(address, tls)
    return _Target(address, channel, language_model_pb2_grpc.LanguageModelStub(channel))
