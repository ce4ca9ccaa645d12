"""One language-model service: its channel, its session, how busy it is, and whether it answers.

Knows nothing about HTTP, nor about other services.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

import grpc

from gateway.model_info import ModelInfo
from gateway.session import Session
from gateway.translate import model_info_from_proto, upload_messages
from protos import language_model_pb2, language_model_pb2_grpc
from protos.channel import ClientTlsConfig, is_serving, open_channel
from protos.directory import Replica
from protos.errors import DeadlineExceeded, ModelError, ServingError, Unavailable
from protos.placement import Load
from protos.request_context import Metadata
from protos.statuses import carries_our_details, error_from_rpc

# A service that was unreachable gets no new requests for this long while others are there.
AVOID_S = 1.0
POLL_INTERVAL_S = 1.0
TOKENIZE_TIMEOUT_S = 30.0
SERVICE_NAME = language_model_pb2.DESCRIPTOR.services_by_name["LanguageModel"].full_name

log = logging.getLogger(__name__)


class LLMTarget:
    """Make it inside a running event loop; `start` lets it notice by itself how the service is."""

    def __init__(self, replica: Replica, tls: ClientTlsConfig | None, timeout_s: float) -> None:
        """`timeout_s`: that the service has to say what it serves."""
        self.address = replica.address
        self.load = Load()  # sequences
        self._timeout_s = timeout_s
        self._channel = open_channel(replica.address, tls, replica.server_name)
        self._stub = language_model_pb2_grpc.LanguageModelStub(self._channel)
        self._session: Session | None = None
        self._avoid_until = 0.0  # time.monotonic()
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        if self._session is not None:
            await self._session.close()
        await self._channel.close()

    async def close_when_idle(self) -> None:
        """Its address is no longer one of a service: answers that have begun may end."""
        try:
            while self.load.own:
                await asyncio.sleep(POLL_INTERVAL_S)
        finally:
            await self.close()

    @property
    def is_avoided(self) -> bool:
        return time.monotonic() < self._avoid_until

    def avoid(self) -> None:
        """A call failed: for a while, or until the service has answered again."""
        self._avoid_until = max(self._avoid_until, time.monotonic() + AVOID_S)

    def session(self) -> Session:
        """The one that is open, or another."""
        if self._session is None or self._session.has_ended:
            self._session = Session(self._stub, self._failure)
        return self._session

    async def upload(self, data: bytes, cache_salt: bytes, metadata: Metadata, deadline_s: float) -> None:
        """Give it a medium that a request will name.  `deadline_s` is the event loop's time.

        Raises:
            ServingError: as the service said it.
        """
        timeout_s = max(deadline_s - asyncio.get_running_loop().time(), 0)
        messages = upload_messages(data, cache_salt)
        try:
            await self._stub.UploadMedia(messages, metadata=metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    async def tokenize(self, request: language_model_pb2.TokenizeRequest) -> list[int]:
        """Raises ServingError as the service said it."""
        try:
            response = await self._stub.Tokenize(request, timeout=TOKENIZE_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return list(response.token_ids)

    async def detokenize(self, request: language_model_pb2.DetokenizeRequest) -> str:
        """Raises ServingError as the service said it."""
        try:
            response = await self._stub.Detokenize(request, timeout=TOKENIZE_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failure(error) from None
        return str(response.text)

    async def model(self) -> ModelInfo:
        """What the service says about itself.

        Raises:
            ServingError: why it does not, or that it drains.
        """
        request = language_model_pb2.GetLanguageModelRequest()
        try:
            response, serving = await asyncio.gather(
                self._stub.GetModel(request, timeout=self._timeout_s),
                is_serving(self._channel, SERVICE_NAME, self._timeout_s),
            )
        except grpc.RpcError as error:
            failure = self._failure(error)
            if isinstance(failure, DeadlineExceeded):
                failure = Unavailable("The language model does not answer.")
            raise failure from None
        if not serving:
            raise Unavailable("The language model takes no requests at the moment.")
        self.load.report(response.sequences_running + response.sequences_waiting)
        return model_info_from_proto(response)

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self.model()
                self._avoid_until = 0.0
            except ServingError:
                self._avoid_until = math.inf
            except Exception:
                log.exception("asking %s failed", self.address)  # the next time may do better
            await asyncio.sleep(POLL_INTERVAL_S)

    def _failure(self, error: grpc.RpcError) -> ServingError:
        failure = error_from_rpc(error)
        if isinstance(failure, Unavailable):
            self.avoid()
        if carries_our_details(error):
            return failure
        # Without our details the text is gRPC's own, which names addresses.
        log.warning("call to %s failed: %s %s", self.address, error.code().name, error.details())
        return type(failure)(_FOREIGN.get(type(failure), "The language model refused the request."))


_FOREIGN: dict[type[ServingError], str] = {
    Unavailable: "The language model is not reachable.",
    DeadlineExceeded: "The request took longer than its time limit.",
    ModelError: "The language model failed.",
}
