"""A proxy in front of an encoder that lies, dawdles and breaks off.

`python -m tests.faulty_encoder TARGET SEED`: every Encode stream has the next of FAULTS.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import grpc

from protos import encoder_pb2, tensor_pb2
from protos.options import SHARED_OPTIONS

SERVICE = "tessera.v1.Encoder"
GARBAGE = b"\xff\xff this is no message"
FAULTS = (
    "none",
    "slow",
    "silent",
    "breaks off",
    "fails",
    "refuses",
    "too few bytes",
    "too few tokens",
    "another dtype",
    "another picture",
    "a tile twice",
    "done too early",
    "garbage",
)

Context = grpc.aio.ServicerContext[Any, Any]


class FaultyEncoder:
    def __init__(self, target: str, seed: int) -> None:
        channel = grpc.aio.insecure_channel(target, options=SHARED_OPTIONS)
        self._encode = channel.stream_stream(f"/{SERVICE}/Encode")
        self._get_model = channel.unary_unary(f"/{SERVICE}/GetModel")
        self._random = random.Random(seed)
        self._streams = count()

    async def get_model(self, request: bytes, context: Context) -> bytes:
        try:
            response: bytes = await self._get_model(request, timeout=2)
            return response
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")

    async def encode(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        fault = FAULTS[next(self._streams) % len(FAULTS)]
        strikes_at = self._random.randrange(3)  # that many tiles pass unharmed
        if fault == "refuses":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more streams")
        call = self._encode(requests)
        num_tiles = 0
        try:
            async for data in call:
                response = encoder_pb2.EncodeResponse.FromString(data)
                event = response.WhichOneof("event")
                if event == "layout":
                    yield _layout(response, fault).SerializeToString()
                elif event == "tile" and num_tiles >= strikes_at:
                    async for sent in _strike(response, fault, context):
                        yield sent
                else:
                    yield data
                num_tiles += event == "tile"
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", error.trailing_metadata() or ())
        finally:
            call.cancel()


def _layout(response: encoder_pb2.EncodeResponse, fault: str) -> encoder_pb2.EncodeResponse:
    if fault == "another dtype":
        response.layout.dtype = tensor_pb2.DTYPE_FLOAT16  # of the same width: only its name tells
    elif fault == "another picture":
        response.layout.media[0].content_hash = bytes(32)
    return response


async def _strike(response: encoder_pb2.EncodeResponse, fault: str, context: Context) -> AsyncIterator[bytes]:
    """What is sent in place of a tile."""
    tile = response.tile
    if fault == "slow":
        await asyncio.sleep(0.1)
    elif fault == "silent":
        await asyncio.sleep(3600)
    elif fault == "breaks off":
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
    elif fault == "fails":
        await context.abort(grpc.StatusCode.INTERNAL, "CUDA error at /somewhere/kernel.cu")
    elif fault == "too few bytes":
        tile.data = tile.data[:-2]
    elif fault == "too few tokens":
        tile.data = tile.data[: len(tile.data) // tile.num_tokens * (tile.num_tokens - 1)]
        tile.num_tokens -= 1
    elif fault == "a tile twice":
        yield response.SerializeToString()
    elif fault == "done too early":
        yield encoder_pb2.EncodeResponse(done=encoder_pb2.Done()).SerializeToString()
        return
    elif fault == "garbage":
        yield GARBAGE
    yield response.SerializeToString()


async def serve(target: str, seed: int) -> None:
    encoder = FaultyEncoder(target, seed)
    server = grpc.aio.server(options=SHARED_OPTIONS)
    handlers = {
        "Encode": grpc.stream_stream_rpc_method_handler(encoder.encode),
        "GetModel": grpc.unary_unary_rpc_method_handler(encoder.get_model),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"tessera encoder ready on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
