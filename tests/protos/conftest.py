"""In-process servers on free ports, and certificates of a private authority."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import encoder_pb2
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.errors import NotFound
from protos.frames import EncodeEvent
from protos.server import Server, ServerConfig
from protos.statuses import rpc_errors

GetModel = Callable[[], Awaitable[encoder_pb2.GetEncoderModelResponse]]
Encode = Callable[[AsyncIterator[encoder_pb2.EncodeRequest]], AsyncIterator[EncodeEvent]]


async def name_the_model() -> encoder_pb2.GetEncoderModelResponse:
    return encoder_pb2.GetEncoderModelResponse(model="scripted")


async def no_events(requests: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
    async for _ in requests:
        pass
    return
    yield  # makes this an async generator


@dataclass
class ScriptedEncoder:
    """An encoder whose two methods are given."""

    get_model: GetModel = name_the_model
    encode: Encode = no_events

    async def GetModel(
        self, request: encoder_pb2.GetEncoderModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> encoder_pb2.GetEncoderModelResponse:
        async with rpc_errors(context):
            return await self.get_model()
        raise AssertionError("rpc_errors ends the call")

    async def Encode(
        self,
        requests: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[EncodeEvent]:
        async with rpc_errors(context):
            async for event in self.encode(requests):
                yield event

    async def Attach(
        self, request: encoder_pb2.AttachRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> encoder_pb2.AttachResponse:
        async with rpc_errors(context):
            raise NotFound("this encoder shares no memory")
        raise AssertionError("rpc_errors ends the call")


@asynccontextmanager
async def running(encoder: ScriptedEncoder, config: ServerConfig | None = None) -> AsyncIterator[Server]:
    """A server of `encoder` that serves; stopped at the end."""
    server = Server(config or ServerConfig(shutdown_grace_s=0), [SERVICE_NAME])
    add_encoder_servicer(encoder, server.grpc)
    await server.start()
    await server.set_serving()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        yield server


@dataclass(frozen=True)
class Certificates:
    """PEM files.  `other_*` are signed by another authority."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        path = self.folder / f"{name}.pem"
        if not path.is_file():
            raise AttributeError(name)
        return str(path)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with the openssl command, which is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    for authority, names in (("ca", ["server", "client", "named"]), ("other_ca", ["other_client"])):
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        openssl(folder, "req", "-x509", *key, *names_of(authority), "-subj", f"/CN={authority}")
        for name in names:
            host = "DNS:encoders.internal" if name == "named" else "IP:127.0.0.1"
            subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={host}"]
            signed_by = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}_key.pem"]
            openssl(folder, "req", "-x509", *key, *names_of(name), *subject, *signed_by)
    return Certificates(folder)


def names_of(name: str) -> list[str]:
    return ["-keyout", f"{name}_key.pem", "-out", f"{name}.pem"]


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
