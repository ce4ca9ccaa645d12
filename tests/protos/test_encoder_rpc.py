"""Our binding of Encoder against itself and against the generated one, over real connections."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from protos import encoder_pb2, encoder_pb2_grpc
from protos.channel import open_channel
from protos.encoder_rpc import EncoderStub
from protos.frames import EncodeEvent, TileFrame
from protos.server import ServerConfig
from tests.protos.conftest import ScriptedEncoder, running

PAYLOAD = bytes(range(256)) * 40
NUM_TILES = 3
END = encoder_pb2.EncodeRequest()


def tile(number: int, data: bytes = b"") -> encoder_pb2.Tile:
    return encoder_pb2.Tile(medium=1, tile=number, num_tokens=16, data=data)


async def frames(requests: AsyncIterator[encoder_pb2.EncodeRequest]) -> AsyncIterator[EncodeEvent]:
    """Tiles as an encoder sends them, once the requests have ended."""
    async for _ in requests:
        pass
    for number in range(NUM_TILES):
        yield TileFrame(tile(number), memoryview(PAYLOAD))


class GeneratedServicer(encoder_pb2_grpc.EncoderServicer):
    """The same answer by the generated code alone."""

    async def Encode(
        self,
        requests: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse],
    ) -> AsyncIterator[encoder_pb2.EncodeResponse]:
        async for _ in requests:
            pass
        for number in range(NUM_TILES):
            yield encoder_pb2.EncodeResponse(tile=tile(number, PAYLOAD))


async def test_ours_to_ours_carries_tiles_outside_the_message() -> None:
    async with running(ScriptedEncoder(encode=frames)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            events = [event async for event in EncoderStub(channel).Encode(iter([END]), timeout=5)]
    assert [type(event) for event in events] == [TileFrame] * NUM_TILES
    for number, event in enumerate(events):
        assert event.tile == tile(number) and bytes(event.payload) == PAYLOAD


async def test_a_generated_client_reads_what_our_servicer_sends() -> None:
    async with running(ScriptedEncoder(encode=frames)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            stub = encoder_pb2_grpc.EncoderStub(channel)
            events = [event async for event in stub.Encode(iter([END]), timeout=5)]
    assert [event.tile for event in events] == [tile(number, PAYLOAD) for number in range(NUM_TILES)]


async def test_our_client_reads_what_a_generated_servicer_sends() -> None:
    server = grpc.aio.server()
    encoder_pb2_grpc.add_EncoderServicer_to_server(GeneratedServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            events = [event async for event in EncoderStub(channel).Encode(iter([END]), timeout=5)]
    finally:
        await server.stop(None)
    assert [(event.tile, bytes(event.payload)) for event in events] == [
        (tile(number), PAYLOAD) for number in range(NUM_TILES)
    ]


async def test_only_the_stream_is_special() -> None:
    async with running(ScriptedEncoder(), ServerConfig(shutdown_grace_s=0, reflection=False)) as server:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            answer = await EncoderStub(channel).GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
            assert answer.model == "scripted"
            unknown = channel.unary_unary("/tessera.v1.Encoder/Nothing")
            with pytest.raises(grpc.RpcError) as caught:
                await unknown(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
