"""The Encode protocol over real gRPC: what is said, what is refused, and what a stream leaves behind."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from prometheus_client import REGISTRY

from encoder_service.container_limits import ContainerLimits
from encoder_service.media import ImageLimits, decode_image
from encoder_service.tiling import TileCutter, TilingOptions, plan_tiles
from encoder_service.vision import VisionEncoder
from protos import encoder_pb2, encoder_pb2_grpc, tensor_pb2
from protos.channel import open_channel
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, EncodeCall, EncoderStub
from protos.errors import DeadlineExceeded, FingerprintMismatch, InvalidRequest, ModelError, ServingError
from protos.fingerprint import FingerprintBase, content_hash
from protos.options import MAX_CHUNK_BYTES
from protos.statuses import error_from_rpc
from tests.checkpoints import make_checkpoint
from tests.encoder_service.hostile_server import HOST, forever, internet, ok, redirect
from tests.encoder_service.wire import (
    SIDE,
    TIMEOUT_S,
    Answer,
    ScriptedVision,
    Service,
    chunk,
    corrupt_pixels,
    finish,
    gradient,
    grant,
    opening,
    read_layout,
    send,
    serving,
    start,
    until,
)
from tests.media_files import LOCK, bare_pdf, number_to_grey, numbered_frames, pdf, sound, video
from tests.processes import ServiceProcess

PICTURE = gradient()
NUM_TILES = 13  # 4 x 3 and a thumbnail
ALL = grant((0, 0, NUM_TILES))
# A PNG may end in anything: a valid picture of more than one chunk.
LONG_PICTURE = PICTURE + bytes(MAX_CHUNK_BYTES)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", "chat", image_size=SIDE)


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Any:
    """Whatever a client does, the service finds nothing unexpected about it.

    gRPC itself logs the write that a leaving client interrupts.
    """
    yield
    if "may_log_errors" not in request.fixturenames:
        records = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
        errors = [record.getMessage() for record in records if record.name != "grpc._cython.cygrpc"]
        assert errors == []


@pytest.fixture
def may_log_errors() -> None:
    """The test makes the tower fail."""


@pytest.fixture
async def service(checkpoint: Path) -> AsyncIterator[Service]:
    async with serving(checkpoint, ScriptedVision()) as running:
        yield running


async def refusal(call: EncodeCall) -> ServingError:
    with pytest.raises(grpc.RpcError) as caught:
        await Answer().read_all(call)
    return error_from_rpc(caught.value)


async def works(service: Service) -> None:
    """A whole stream, from upload to Done."""
    call = await start(service, [PICTURE], initial_credit=NUM_TILES)
    await read_layout(call)
    answer = await finish(call)
    assert answer.tiles == [(0, tile) for tile in range(NUM_TILES)]
    assert answer.timings is not None


async def layout_of(service: Service, pictures: Sequence[bytes], **fields: Any) -> encoder_pb2.Layout:
    call = await start(service, pictures, **fields)
    layout = await read_layout(call)
    await finish(call)
    return layout


class TestLayout:
    async def test_says_everything_from_the_header(self, service: Service, checkpoint: Path) -> None:
        tall = gradient(1, SIDE, 2 * SIDE, "JPEG")
        layout = await layout_of(service, [PICTURE, tall])
        wide, narrow = layout.media
        assert (wide.width, wide.height, wide.columns, wide.rows) == (4 * SIDE, 3 * SIDE, 4, 3)
        assert (wide.has_thumbnail, wide.final, list(wide.tokens_per_tile)) == (True, True, [1] * 13)
        assert (narrow.columns, narrow.rows, list(narrow.tokens_per_tile)) == (1, 2, [1, 1, 1])
        assert (layout.hidden_size, layout.dtype) == (8, tensor_pb2.DTYPE_FLOAT32)
        assert layout.transport == encoder_pb2.TRANSPORT_INLINE
        dtype = tensor_pb2.DTYPE_FLOAT32
        fingerprint = FingerprintBase(open_checkpoint(str(checkpoint))).fingerprint(dtype, dtype)
        assert wide.content_hash == content_hash(PICTURE, 1, 12, True, fingerprint)
        assert narrow.content_hash == content_hash(tall, 1, 12, True, fingerprint)

    async def test_comes_for_a_picture_with_corrupt_pixels_and_its_first_tile_fails(
        self, service: Service
    ) -> None:
        broken = corrupt_pixels(gradient(format="JPEG"))
        call = await start(service, [PICTURE, broken])
        assert len((await read_layout(call)).media[1].tokens_per_tile) == NUM_TILES
        await send(call, grant((0, 0, 2), (1, 0, 1)))
        answer = Answer()
        await answer.read(call, 2)
        error = await refusal(call)
        assert answer.tiles == [(0, 0), (0, 1)]
        assert (type(error), error.field) == (InvalidRequest, "media[1].data")

    async def test_each_picture_has_its_own_tiling(self, service: Service) -> None:
        tilings = [
            encoder_pb2.TilingOptions(max_tiles=1),
            encoder_pb2.TilingOptions(max_tiles=4, use_thumbnail=False),
            encoder_pb2.TilingOptions(min_tiles=20, max_tiles=20),
        ]
        media = [
            encoder_pb2.Medium(kind=encoder_pb2.MEDIA_KIND_IMAGE, num_bytes=len(PICTURE), tiling=tiling)
            for tiling in tilings
        ]
        layout = await layout_of(service, [PICTURE] * 3, media=media)
        grids = [(medium.columns, medium.rows, medium.has_thumbnail) for medium in layout.media]
        assert grids == [(1, 1, False), (2, 2, False), (5, 4, True)]
        assert len({medium.content_hash for medium in layout.media}) == 3

    async def test_bytes_may_come_in_any_chunks(self, service: Service) -> None:
        call = service.stub.Encode(timeout=TIMEOUT_S)
        await send(call, opening([PICTURE, LONG_PICTURE], initial_credit=100))
        await send(call, *(chunk(0, PICTURE[at : at + 100]) for at in range(0, len(PICTURE), 100)))
        for at in range(0, len(LONG_PICTURE), MAX_CHUNK_BYTES):
            await send(call, chunk(1, LONG_PICTURE[at : at + MAX_CHUNK_BYTES]))
        assert len((await read_layout(call)).media) == 2
        answer = await finish(call)
        assert answer.payloads[:NUM_TILES] == answer.payloads[NUM_TILES:]


class TestWatchLoad:
    async def test_decoded_pictures_show_in_the_metrics(self, service: Service) -> None:
        service.servicer.watch_load()
        call = await start(service, [PICTURE], initial_credit=1)
        await read_layout(call)
        await Answer().read(call, 1)
        held = REGISTRY.get_sample_value("tessera_encoder_pixel_bytes")
        assert held == (await service.load())["pixel_bytes"] > 0
        await finish(call)
        assert REGISTRY.get_sample_value("tessera_encoder_pixel_bytes") == 0


class TestTiles:
    async def test_are_what_the_tower_makes_of_the_pictures(self, checkpoint: Path) -> None:
        vision = VisionEncoder.load(open_checkpoint(str(checkpoint)), "cpu")
        pictures = [PICTURE, gradient(2, 3 * SIDE, SIDE, "JPEG")]
        async with serving(checkpoint, vision) as service:
            call = await start(service, pictures, initial_credit=100)
            layout = await read_layout(call)
            answer = await finish(call)
        expected = torch.cat([vision.encode(tiles_of(data)) for data in pictures])
        assert answer.tiles == [(0, tile) for tile in range(13)] + [(1, tile) for tile in range(4)]
        payload = bytearray(b"".join(answer.payloads))
        shape = (17, vision.preprocessing.tokens_per_tile, layout.hidden_size)
        torch.testing.assert_close(torch.frombuffer(payload, dtype=torch.float32).view(shape), expected)

    async def test_come_in_the_order_of_the_grants(self, service: Service) -> None:
        call = await start(service, [PICTURE, gradient(1)])
        await read_layout(call)
        ranges = [(1, 12, 1), (0, 3, 4), (1, 0, 2), (0, 0, 1), (1, 2, 9), (0, 12, 1)]
        await send(call, *(grant(granted) for granted in ranges[:3]), grant(*ranges[3:]))
        answer = await finish(call)
        assert answer.tiles == [(m, first + i) for m, first, count in ranges for i in range(count)]

    async def test_come_twice_when_granted_twice(self, service: Service) -> None:
        call = await start(service, [PICTURE], initial_credit=1)
        await read_layout(call)
        await send(call, grant((0, 5, 1), (0, 0, 1)), grant((0, 5, 1)))
        answer = await finish(call)
        assert answer.tiles == [(0, 0), (0, 5), (0, 0), (0, 5)]
        assert answer.payloads[:2] == answer.payloads[2:] and answer.payloads[0] != answer.payloads[1]

    @pytest.mark.parametrize(
        ("credit", "expected"), [(0, 0), (1, 1), (14, 14), (26, 26), (4_000_000_000, 26)]
    )
    async def test_of_the_initial_credit_come_unasked_across_pictures(
        self, service: Service, credit: int, expected: int
    ) -> None:
        call = await start(service, [PICTURE, gradient(1)], initial_credit=credit)
        await read_layout(call)
        answer = await finish(call)
        order = [(medium, tile) for medium in range(2) for tile in range(NUM_TILES)]
        assert answer.tiles == order[:expected]

    async def test_of_the_initial_credit_are_encoded_while_the_next_picture_is_uploaded(
        self, checkpoint: Path
    ) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            call = service.stub.Encode()
            await send(call, opening([PICTURE, LONG_PICTURE], initial_credit=14), chunk(0, PICTURE))
            await until(lambda: sum(vision.batches) == NUM_TILES)
            for start_at in (0, MAX_CHUNK_BYTES):
                await send(call, chunk(1, LONG_PICTURE[start_at : start_at + MAX_CHUNK_BYTES]))
            assert len((await read_layout(call)).media) == 2
            answer = await finish(call)
            assert answer.tiles == [*((0, tile) for tile in range(NUM_TILES)), (1, 0)]

    async def test_that_are_under_way_are_dropped_when_a_later_picture_is_refused(
        self, service: Service
    ) -> None:
        call = await start(service, [PICTURE, b"no picture"], initial_credit=NUM_TILES)
        error = await refusal(call)
        assert isinstance(error, InvalidRequest) and error.field == "media[1].data"
        await service.until_idle()
        await works(service)

    async def test_the_first_refused_picture_is_named_whichever_is_found_first(
        self, service: Service
    ) -> None:
        error = await refusal(await start(service, [PICTURE, b"no picture", b"nor this"]))
        assert isinstance(error, InvalidRequest) and error.field == "media[1].data"

    async def test_can_be_granted_before_the_layout_is_read(self, service: Service) -> None:
        call = await start(service, [PICTURE])
        await send(call, ALL)
        await call.done_writing()
        await read_layout(call)
        assert len((await Answer().read_all(call)).tiles) == NUM_TILES

    async def test_can_be_granted_long_after_the_last_one(self, service: Service) -> None:
        call = await start(service, [PICTURE])
        await read_layout(call)
        answer = Answer()
        for tile in (0, 7, 3):
            await send(call, grant((0, tile, 1)))
            await answer.read(call, len(answer.tiles) + 1)
            await asyncio.sleep(0.01)
        await call.done_writing()
        assert (await answer.read_all(call)).tiles == [(0, 0), (0, 7), (0, 3)]

    async def test_of_two_streams_share_a_forward_and_stay_apart(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            alone = []
            for seed in range(2):
                call = await start(service, [gradient(seed)], initial_credit=6)
                await read_layout(call)
                alone.append((await finish(call)).payloads)
            vision.gate.clear()
            vision.batches.clear()
            first = await start(service, [gradient(3)], initial_credit=1)
            await until(lambda: vision.batches == [1])
            calls = [await start(service, [gradient(seed)], initial_credit=6) for seed in range(2)]
            await service.until_load(tiles=12)
            vision.gate.set()
            for call, payloads in zip(calls, alone, strict=True):
                await read_layout(call)
                assert (await finish(call)).payloads == payloads
            assert vision.batches == [1, 12]
            await read_layout(first)
            await finish(first)

    async def test_reach_a_client_with_the_generated_stub_alone(self, service: Service) -> None:
        call = await start(service, [PICTURE], initial_credit=3)
        await read_layout(call)
        ours = await finish(call)
        plain = encoder_pb2_grpc.EncoderStub(service.channel).Encode(timeout=TIMEOUT_S)
        await plain.write(opening([PICTURE], initial_credit=3))
        await plain.write(chunk(0, PICTURE))
        await plain.done_writing()
        events = [event async for event in plain]
        assert [event.WhichOneof("event") for event in events] == ["layout", *["tile"] * 3, "done"]
        tiles = [event.tile for event in events[1:4]]
        assert [(tile.medium, tile.tile, tile.num_tokens) for tile in tiles] == [(0, i, 1) for i in range(3)]
        assert [tile.data for tile in tiles] == ours.payloads

    async def test_are_the_very_bytes_that_protobuf_writes(self, service: Service) -> None:
        method: Any = service.channel.stream_stream(f"/{SERVICE_NAME}/Encode")  # no serialisers: raw bytes
        call = method(timeout=TIMEOUT_S)
        for message in (opening([PICTURE], initial_credit=3), chunk(0, PICTURE)):
            await call.write(message.SerializeToString())
        await call.done_writing()
        messages = [message async for message in call]
        assert len(messages) == 5
        for message in messages:
            assert encoder_pb2.EncodeResponse.FromString(message).SerializeToString() == message


def tiles_of(data: bytes) -> torch.Tensor:
    image = decode_image(data, ImageLimits(), "data")
    plan = plan_tiles(*image.size, TilingOptions(1, 12, True), SIDE)
    return TileCutter(image, plan, SIDE).cut(range(plan.num_tiles))


class TestDone:
    async def test_says_where_the_time_went(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            vision.gate.clear()
            call = await start(service, [PICTURE], initial_credit=2)
            await until(lambda: vision.batches == [2])
            await asyncio.sleep(0.05)
            vision.gate.set()
            await read_layout(call)
            timings = (await finish(call)).timings
        assert timings is not None
        assert timings.encode_ns >= 100_000_000  # two tiles
        assert min(timings.decode_ns, timings.tile_ns, timings.queue_ns) > 0
        assert timings.total_ns >= timings.encode_ns / 2 + timings.decode_ns

    async def test_comes_without_any_grant(self, service: Service) -> None:
        call = await start(service, [PICTURE])
        await read_layout(call)
        answer = await finish(call)
        assert (answer.tiles, answer.timings is not None) == ([], True)


class TestHeartbeats:
    async def test_come_while_the_tower_is_slow(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision, max_batch_tiles=2) as service:
            await works(service)
            forwards = len(vision.batches)
            vision.gate.clear()
            call = await start(service, [PICTURE], initial_credit=4)
            await read_layout(call)
            seconds = await heartbeat_seconds(call, 4, forwards_done=forwards, tiles_queued=2)
            vision.gate.set()
            await finish(call)
        assert seconds == pytest.approx([0.2] * 4, abs=0.12)

    async def test_come_while_nothing_is_granted(self, service: Service) -> None:
        call = await start(service, [PICTURE])
        await read_layout(call)
        seconds = await heartbeat_seconds(call, 3, forwards_done=0, tiles_queued=0)
        assert seconds == pytest.approx([0.2] * 3, abs=0.12)
        call.cancel()

    async def test_come_on_a_half_closed_stream_too(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            vision.gate.clear()
            call = await start(service, [PICTURE], initial_credit=1)
            await read_layout(call)
            await call.done_writing()
            await heartbeat_seconds(call, 2, forwards_done=0, tiles_queued=0)
            vision.gate.set()
            assert (await Answer().read_all(call)).tiles == [(0, 0)]


async def heartbeat_seconds(
    call: EncodeCall, count: int, forwards_done: int, tiles_queued: int
) -> list[float]:
    """Times between the next messages, all of which are heartbeats that say so."""
    seconds, last = [], time.monotonic()
    for _ in range(count):
        event = await call.read()
        assert isinstance(event, encoder_pb2.EncodeResponse)
        expected = encoder_pb2.Heartbeat(forwards_done=forwards_done, tiles_queued=tiles_queued)
        assert event.heartbeat == expected and event.WhichOneof("event") == "heartbeat"
        now = time.monotonic()
        seconds.append(now - last)
        last = now
    return seconds


class TestGetModel:
    async def test_says_what_is_loaded_and_its_limits(self, checkpoint: Path) -> None:
        limits = ImageLimits(max_bytes=1234, max_pixels=56_789)
        config = {"max_media": 3, "max_tiles": 20, "image_limits": limits}
        async with serving(checkpoint, ScriptedVision(), **config) as service:
            model = await service.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
        dtype = tensor_pb2.DTYPE_FLOAT32
        assert model.fingerprint == FingerprintBase(open_checkpoint(str(checkpoint))).fingerprint(
            dtype, dtype
        )
        assert (model.model, model.compute_dtype, model.payload_dtype) == ("a model", dtype, dtype)
        assert (model.hidden_size, model.tokens_per_tile) == (8, 1)
        tiling = encoder_pb2.TilingOptions(min_tiles=1, max_tiles=12, use_thumbnail=True)
        assert model.tiling == tiling
        assert (model.max_tiles, model.max_media, model.max_media_bytes, model.max_pixels) == (
            20,
            3,
            1234,
            56_789,
        )

    async def test_never_promises_fewer_tiles_than_the_checkpoint_takes(self, checkpoint: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), max_tiles=2) as service:
            model = await service.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
            assert model.max_tiles == 12
            await works(service)

    async def test_says_how_busy_it_is(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision, max_batch_tiles=4) as service:
            vision.gate.clear()
            calls = [await start(service, [gradient(seed)], initial_credit=7) for seed in range(2)]
            for call in calls:
                await read_layout(call)
            await service.until_load(tiles=10, streams=2)
            vision.gate.set()
            for call in calls:
                await finish(call)


def media(*num_bytes: int, **fields: Any) -> list[encoder_pb2.Medium]:
    values: dict[str, Any] = {"kind": encoder_pb2.MEDIA_KIND_IMAGE} | fields
    return [encoder_pb2.Medium(num_bytes=length, **values) for length in num_bytes]


def tiled(**tiling: Any) -> encoder_pb2.EncodeRequest:
    return opening([PICTURE], media=media(len(PICTURE), tiling=encoder_pb2.TilingOptions(**tiling)))


UPLOAD = (opening([PICTURE]), chunk(0, PICTURE))


def by_url(name: str = "a.png", **fields: Any) -> encoder_pb2.Medium:
    kind = fields.pop("kind", encoder_pb2.MEDIA_KIND_IMAGE)
    return encoder_pb2.Medium(kind=kind, url=f"https://{HOST}/{name}", **fields)


BAD_STREAMS: dict[str, tuple[Sequence[encoder_pb2.EncodeRequest], str]] = {
    "nothing": ((), "open"),
    "an empty message first": ((encoder_pb2.EncodeRequest(),), "open"),
    "a chunk first": ((chunk(0, PICTURE),), "open"),
    "a grant first": ((ALL,), "open"),
    "no media": ((opening([]),), "media"),
    "too many media": ((opening([PICTURE] * 5),), "media"),
    "too many bytes in all": ((opening([], media=media(30_000, 30_000, 5_000)),), "media"),
    "too many bytes of one": ((opening([], media=media(10, 40_001)),), "media[1].data"),
    "more bytes than fit a number": ((opening([], media=media(2**64 - 1)),), "media"),
    "an unspecified kind": ((opening([], media=media(10, kind=0)),), "media[0].kind"),
    "an unknown kind": ((opening([], media=media(10, kind=77)),), "media[0].kind"),
    "no dtype": ((opening([PICTURE], payload_dtypes=[]),), "payload_dtypes"),
    "another dtype": (
        (opening([PICTURE], payload_dtypes=[tensor_pb2.DTYPE_FLOAT8_E5M2, 99]),),
        "payload_dtypes",
    ),
    "no transport": ((opening([PICTURE], transports=[]),), "transports"),
    "another transport": ((opening([PICTURE], transports=[2]),), "transports"),
    "zero tiles at most": ((tiled(max_tiles=0), chunk(0, PICTURE)), "media[0].tiling.max_tiles"),
    "too many tiles": ((tiled(max_tiles=41), chunk(0, PICTURE)), "media[0].tiling.max_tiles"),
    "zero tiles at least": ((tiled(min_tiles=0), chunk(0, PICTURE)), "media[0].tiling.min_tiles"),
    "min above max": ((tiled(min_tiles=4, max_tiles=3), chunk(0, PICTURE)), "media[0].tiling.min_tiles"),
    "a URL where none is fetched": ((opening([], media=[by_url()]),), "media[0].url"),
    "a URL and bytes": ((opening([], media=[by_url(num_bytes=10)]),), "media[0].url"),
    "an empty picture": ((opening([b""]),), "media[0].data"),
    "no picture": ((opening([b"hello", PICTURE]), chunk(0, b"hello"), chunk(1, PICTURE)), "media[0].data"),
    "a picture cut in its header": (
        (opening([PICTURE, PICTURE[:20]]), *UPLOAD[1:], chunk(1, PICTURE[:20])),
        "media[1].data",
    ),
    "bytes missing": ((opening([PICTURE]), chunk(0, PICTURE[:-1])), "media[0].data"),
    "a medium missing": ((opening([PICTURE, PICTURE]), chunk(0, PICTURE)), "media[1].data"),
    "a grant amid the bytes": ((opening([PICTURE]), chunk(0, PICTURE[:-1]), ALL), "media[0].data"),
    "a second open": ((opening([PICTURE]), opening([PICTURE])), "media[0].data"),
    "the second medium first": ((opening([PICTURE, PICTURE]), chunk(1, PICTURE)), "media[0].data"),
    "a chunk of no medium": ((opening([PICTURE]), chunk(7, PICTURE)), "media[0].data"),
    "too many bytes for their medium": ((opening([PICTURE]), chunk(0, PICTURE + b"x")), "media[0].data"),
    "an empty chunk": ((opening([PICTURE]), chunk(0, b"")), "media[0].data"),
    "a chunk after the bytes": ((*UPLOAD, chunk(0, b"x")), "grant"),
    "an open after the bytes": ((*UPLOAD, opening([PICTURE])), "grant"),
    "an empty message after the bytes": ((*UPLOAD, encoder_pb2.EncodeRequest()), "grant"),
    "a tile of no medium": ((*UPLOAD, grant((1, 0, 1))), "grant.tiles[0]"),
    "a tile beyond the picture": ((*UPLOAD, grant((0, 0, 1), (0, 13, 1))), "grant.tiles[1]"),
    "tiles beyond the picture": ((*UPLOAD, grant((0, 12, 2))), "grant.tiles[0]"),
    "no tiles": ((*UPLOAD, grant((0, 0, 0))), "grant.tiles[0]"),
    "tiles beyond any number": ((*UPLOAD, grant((0, 2**32 - 1, 2**32 - 1))), "grant.tiles[0]"),
    "the same tiles too often": ((*UPLOAD, grant(*[(0, 0, 13)] * 2000)), "grant.tiles[1262]"),
}


BOMB = PICTURE[:16] + (50_000).to_bytes(4, "big") * 2 + PICTURE[24:]
UNUSABLE_FILES = {
    "an SVG": ok(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Content-Type: image/png"),
    "a page": ok(b"<!doctype html><title>a</title>", "Content-Type: image/png"),
    "nothing": ok(b""),
    "a picture cut in its header": ok(PICTURE[:20]),
    "a picture of 2.5 gigapixels": ok(BOMB),
    "a picture in a broken transfer": ok(PICTURE)[:-50],
    "a picture that is too large": ok(LONG_PICTURE),
    "a video": ok(bare_pdf()),
    "what loopback has": redirect("https://127.0.0.1/"),
    "an endless file": forever(b"HTTP/1.1 200 OK\r\n\r\n", bytes(10_000)),
}


class TestUrls:
    async def test_a_picture_is_the_same_by_its_url_and_as_bytes(self, checkpoint: Path) -> None:
        page = PICTURE + b"<html><script>alert(1)</script>"  # a polyglot: what it begins with counts
        async with internet(**{"a.png": ok(page, "Content-Type: text/html")}) as it:
            async with serving(checkpoint, ScriptedVision(), it.fetcher()) as service:
                inline = await start(service, [page], initial_credit=NUM_TILES)
                fetched = await start(service, [], media=[by_url()], initial_credit=NUM_TILES)
                assert (await read_layout(fetched)).media == (await read_layout(inline)).media
                assert (await finish(fetched)).payloads == (await finish(inline)).payloads

    async def test_bytes_and_urls_keep_their_order(self, checkpoint: Path) -> None:
        async with internet(**{"a.png": ok(gradient(1)), "b.png": ok(gradient(2))}) as it:
            async with serving(checkpoint, ScriptedVision(), it.fetcher()) as service:
                by_bytes = encoder_pb2.Medium(kind=encoder_pb2.MEDIA_KIND_IMAGE, num_bytes=len(PICTURE))
                call: EncodeCall = service.stub.Encode(timeout=TIMEOUT_S)
                await send(call, opening([], media=[by_url("a.png"), by_bytes, by_url("b.png")]))
                await send(call, chunk(1, PICTURE))
                hashes = [medium.content_hash for medium in (await read_layout(call)).media]
                await finish(call)
                inline = await layout_of(service, [gradient(1), PICTURE, gradient(2)])
                assert hashes == [medium.content_hash for medium in inline.media]

    async def test_a_document_and_a_video_come_by_the_same_way(self, checkpoint: Path) -> None:
        async with internet(
            **{"a.pdf": ok(bare_pdf(num_pages=2)), "a.mp4": ok(video(numbered_frames(4)))}
        ) as it:
            async with serving(checkpoint, ScriptedVision(), it.fetcher()) as service:
                document = by_url("a.pdf", kind=encoder_pb2.MEDIA_KIND_DOCUMENT)
                clip = by_url("a.mp4", kind=encoder_pb2.MEDIA_KIND_VIDEO)
                call = await start(service, [], media=[document, clip])
                layout = await read_layout(call)
                assert [len(medium.parts) for medium in layout.media] == [2, 4]
                await finish(call)

    @pytest.mark.parametrize("kind", UNUSABLE_FILES)
    async def test_what_is_no_picture_names_its_url(self, checkpoint: Path, kind: str) -> None:
        limits = ImageLimits(max_bytes=100_000)
        async with internet(**{"a.png": UNUSABLE_FILES[kind]}) as it:
            async with serving(checkpoint, ScriptedVision(), it.fetcher(), image_limits=limits) as service:
                call = await start(service, [], media=[by_url()])
                error = await refusal(call)
                assert (type(error), error.field) == (InvalidRequest, "media[0].url")
                assert "127." not in error.message and HOST not in error.message

    async def test_the_media_of_a_stream_have_one_budget(self, checkpoint: Path) -> None:
        async with internet(**{"a.png": ok(PICTURE)}) as it:
            config = {"max_stream_bytes": len(PICTURE) * 2}
            async with serving(checkpoint, ScriptedVision(), it.fetcher(), **config) as service:
                call = await start(service, [], media=[by_url()] * 2)
                await read_layout(call)
                await finish(call)
                error = await refusal(await start(service, [], media=[by_url()] * 3))
                assert isinstance(error, InvalidRequest)

    async def test_a_client_that_leaves_ends_the_fetch(self, checkpoint: Path) -> None:
        async with internet(**{"a.png": forever(b"", b"", 0.01)}) as it:
            async with serving(checkpoint, ScriptedVision(), it.fetcher(fetch_timeout_s=30)) as service:
                call = await start(service, [], media=[by_url()])
                await until(lambda: bool(it.requests))
                call.cancel()
                await until(lambda: not it.open_connections)


class TestBadStreams:
    @pytest.mark.parametrize("kind", BAD_STREAMS)
    async def test_are_refused_by_name_and_disturb_nobody(self, checkpoint: Path, kind: str) -> None:
        limits = ImageLimits(max_bytes=40_000)
        config = {"max_media": 4, "max_stream_bytes": 60_000, "image_limits": limits}
        messages, field = BAD_STREAMS[kind]
        async with serving(checkpoint, ScriptedVision(), **config) as service:
            other = await start(service, [PICTURE])
            await read_layout(other)
            call = service.stub.Encode(iter(messages), timeout=TIMEOUT_S)
            error = await refusal_after_layout(call)
            assert (type(error), error.field) == (InvalidRequest, field)
            await send(other, ALL)
            assert len((await finish(other)).tiles) == NUM_TILES

    async def test_after_some_tiles_a_bad_grant_ends_the_stream_with_its_field(
        self, service: Service
    ) -> None:
        call = await start(service, [PICTURE], initial_credit=3)
        await read_layout(call)
        await Answer().read(call, 3)
        await send(call, grant((0, 0, 1), (0, 99, 1)))
        error = await refusal(call)
        assert (type(error), error.field) == (InvalidRequest, "grant.tiles[1]")

    async def test_a_picture_is_cut_at_once_however_small_the_towers_batches_are(
        self, checkpoint: Path
    ) -> None:
        """Else it might be decoded several times, where other pictures need its room."""
        vision = ScriptedVision()
        vision.gate.clear()
        async with serving(checkpoint, vision, max_batch_tiles=2) as service:
            call = await start(service, [PICTURE], initial_credit=NUM_TILES)
            await read_layout(call)
            await service.until_load(tiles=NUM_TILES - 2)
            vision.gate.set()
            assert len((await finish(call)).tiles) == NUM_TILES

    async def test_more_tiles_than_may_wait_are_refused_under_any_credit(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("encoder_service.stream_writer.MAX_WAITING_GRANTS", 10)
        pictures = [gradient(seed) for seed in range(6)]
        messages = [opening(pictures, initial_credit=2**32 - 1)]
        messages += [chunk(index, data) for index, data in enumerate(pictures)]
        error = await refusal(service.stub.Encode(iter(messages), timeout=TIMEOUT_S))
        assert (type(error), error.field) == (InvalidRequest, "initial_credit")

    async def test_a_bad_grant_is_told_while_the_tower_is_busy(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            vision.gate.clear()
            call = await start(service, [PICTURE], initial_credit=5)
            await read_layout(call)
            await send(call, grant((9, 0, 1)))
            assert (await refusal(call)).field == "grant.tiles[0]"
            vision.gate.set()

    async def test_a_chunk_above_one_mebibyte_is_refused(self, service: Service) -> None:
        call = service.stub.Encode(iter((opening([LONG_PICTURE]), chunk(0, LONG_PICTURE))), timeout=TIMEOUT_S)
        error = await refusal(call)
        assert (type(error), error.field) == (InvalidRequest, "media[0].data")

    async def test_another_fingerprint_is_a_failed_precondition(self, service: Service) -> None:
        call = service.stub.Encode(iter((opening([PICTURE], expected_fingerprint=b"x" * 32),)), timeout=5)
        error = await refusal(call)
        assert (type(error), error.field) == (FingerprintMismatch, "expected_fingerprint")

    async def test_the_right_fingerprint_is_accepted(self, service: Service) -> None:
        model = await service.stub.GetModel(encoder_pb2.GetEncoderModelRequest(), timeout=5)
        call = await start(service, [PICTURE], expected_fingerprint=model.fingerprint)
        await read_layout(call)
        await finish(call)

    async def test_no_message_at_all_counts_as_a_stalled_upload(self, checkpoint: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), upload_timeout_s=0.2) as service:
            assert isinstance(await refusal(service.stub.Encode(timeout=TIMEOUT_S)), DeadlineExceeded)

    async def test_an_upload_that_stalls_has_a_deadline(self, checkpoint: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), upload_timeout_s=0.3) as service:
            call = service.stub.Encode(timeout=TIMEOUT_S)
            await send(call, opening([PICTURE]), chunk(0, PICTURE[:10]))
            started = time.monotonic()
            assert isinstance(await refusal(call), DeadlineExceeded)
            assert 0.2 < time.monotonic() - started < TIMEOUT_S / 2

    async def test_waiting_for_grants_is_no_stalled_upload(self, checkpoint: Path) -> None:
        async with serving(checkpoint, ScriptedVision(), upload_timeout_s=0.1) as service:
            call = await start(service, [PICTURE])
            await read_layout(call)
            await asyncio.sleep(0.3)
            await send(call, ALL)
            assert len((await finish(call)).tiles) == NUM_TILES

    async def test_a_stream_that_has_its_tiles_and_grants_no_more_has_a_deadline(
        self, checkpoint: Path
    ) -> None:
        async with serving(checkpoint, ScriptedVision(), idle_timeout_s=0.3) as service:
            call = await start(service, [PICTURE], initial_credit=1)
            await read_layout(call)
            await Answer().read(call, 1)
            started = time.monotonic()
            error = await refusal(call)
            assert (type(error), error.field) == (DeadlineExceeded, "grant")
            assert 0.2 < time.monotonic() - started < TIMEOUT_S / 2
            await works(service)

    async def test_a_slow_tower_is_no_idle_stream(self, checkpoint: Path) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision, idle_timeout_s=0.1) as service:
            vision.gate.clear()
            call = await start(service, [PICTURE], initial_credit=1)
            await read_layout(call)
            await heartbeat_seconds(call, 2, forwards_done=0, tiles_queued=0)
            vision.gate.set()
            assert (await finish(call)).tiles == [(0, 0)]

    async def test_a_failing_tower_fails_its_streams_only_and_tells_nothing(
        self, checkpoint: Path, may_log_errors: None
    ) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision) as service:
            vision.fails = True
            call = await start(service, [PICTURE], initial_credit=NUM_TILES)
            error = await refusal_after_layout(call)
            assert isinstance(error, ModelError) and "secret" not in error.message
            vision.fails = False
            await works(service)


async def refusal_after_layout(call: EncodeCall) -> ServingError:
    """The stream's error, whether a layout came before it or not."""
    with pytest.raises(grpc.RpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return error_from_rpc(caught.value)


Leave = Callable[[EncodeCall, grpc.aio.Channel], Awaitable[None]]


async def cancel(call: EncodeCall, channel: grpc.aio.Channel) -> None:
    call.cancel()


async def disconnect(call: EncodeCall, channel: grpc.aio.Channel) -> None:
    await channel.close()


@pytest.mark.parametrize("leave", [cancel, disconnect])
class TestLeaving:
    """Every stage at which a client may go: `serving` ends only when nothing of the stream is left."""

    async def test_before_the_first_message(self, checkpoint: Path, leave: Leave) -> None:
        async with serving(checkpoint, ScriptedVision()) as service, open_other(service) as (stub, channel):
            call = stub.Encode(timeout=TIMEOUT_S)
            await service.until_load(streams=1)
            await leave(call, channel)
            await service.until_idle()
            await works(service)

    async def test_amid_the_upload(self, checkpoint: Path, leave: Leave) -> None:
        async with serving(checkpoint, ScriptedVision()) as service, open_other(service) as (stub, channel):
            call = stub.Encode(timeout=TIMEOUT_S)
            await send(call, opening([PICTURE, PICTURE]), chunk(0, PICTURE), chunk(1, PICTURE[:10]))
            await service.until_load(streams=1)
            await leave(call, channel)
            await service.until_idle()
            await works(service)

    async def test_after_the_layout(self, checkpoint: Path, leave: Leave) -> None:
        async with serving(checkpoint, ScriptedVision()) as service, open_other(service) as (stub, channel):
            call = await start(service, [PICTURE], stub=stub)
            await read_layout(call)
            await leave(call, channel)
            await service.until_idle()
            await works(service)

    async def test_with_decoded_pictures_between_grants(self, checkpoint: Path, leave: Leave) -> None:
        async with serving(checkpoint, ScriptedVision()) as service, open_other(service) as (stub, channel):
            call = await start(service, [PICTURE], stub=stub, initial_credit=2)
            await read_layout(call)
            await Answer().read(call, 2)
            assert (await service.load())["pixel_bytes"] > 0
            await leave(call, channel)
            await service.until_idle()
            await works(service)

    @pytest.mark.parametrize("credit", [1, NUM_TILES])
    async def test_with_tiles_in_a_forward_and_in_the_queue(
        self, checkpoint: Path, leave: Leave, credit: int
    ) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision, max_batch_tiles=4) as service:
            async with open_other(service) as (stub, channel):
                vision.gate.clear()
                call = await start(service, [PICTURE], stub=stub, initial_credit=credit)
                await read_layout(call)
                await until(lambda: bool(vision.batches))
                await service.until_load(tiles=max(credit - 4, 0))
                assert vision.batches == [min(credit, 4)]
                await leave(call, channel)
                await service.until_idle()  # while its forward still runs
            vision.gate.set()
            await works(service)

    async def test_without_having_read_what_came(self, checkpoint: Path, leave: Leave) -> None:
        """The service is blocked by flow control inside its write."""
        vision = ScriptedVision(hidden_size=1 << 18)
        async with serving(checkpoint, vision) as service, open_other(service) as (stub, channel):
            call = await start(service, [PICTURE] * 8, stub=stub, initial_credit=1000)
            assert await until_still(vision) < 8 * NUM_TILES
            await leave(call, channel)
            await service.until_idle()
            await works(service)


@asynccontextmanager
async def open_other(service: Service) -> AsyncIterator[tuple[EncoderStub, grpc.aio.Channel]]:
    """A connection that may be closed without harm to the service's own."""
    async with open_channel(f"127.0.0.1:{service.server.port}") as channel:
        yield EncoderStub(channel), channel


async def until_still(vision: ScriptedVision) -> int:
    """Wait until no more forwards run; returns the tiles that were encoded."""
    encoded = -1
    while encoded != sum(vision.batches):
        encoded = sum(vision.batches)
        await asyncio.sleep(0.25)
    return encoded


class TestCache:
    @pytest.mark.parametrize(("mib", "encoded"), [(1, (1, 1, 2, 2, 2)), (0, (1, 2, 3, 4, 5))])
    async def test_a_picture_that_comes_again_under_its_salt_costs_no_forward(
        self, checkpoint: Path, mib: int, encoded: tuple[int, ...]
    ) -> None:
        vision = ScriptedVision()
        async with serving(checkpoint, vision, host_cache_mib=mib) as service:
            answers = []
            for salt, times in zip((b"", b"", b"a tenant", b"a tenant", b""), encoded, strict=True):
                call = await start(service, [PICTURE], initial_credit=NUM_TILES, cache_salt=salt)
                await read_layout(call)
                answers.append(await finish(call))
                assert sum(vision.batches) == times * NUM_TILES
        assert all(answer.payloads == answers[0].payloads for answer in answers)
        assert answers[1].timings is not None
        assert (answers[1].timings.decode_ns == answers[1].timings.encode_ns == 0) == bool(mib)


class TestManyStreams:
    async def test_a_client_that_does_not_read_holds_up_nobody_and_little_memory(
        self, checkpoint: Path
    ) -> None:
        """1 MiB a tile, 312 tiles: what is encoded is what is cut ahead and what gRPC and the kernel hold."""
        vision = ScriptedVision(hidden_size=1 << 18)
        async with serving(checkpoint, vision, max_batch_tiles=4) as service:
            stalled = await start(service, [gradient(seed) for seed in range(1, 25)], initial_credit=1000)
            encoded = await until_still(vision)
            assert 0 < encoded < 100
            await works(service)
            await works(service)
            assert await until_still(vision) == encoded + 2 * NUM_TILES
            await read_layout(stalled)
            answer = await finish(stalled)
            assert len(answer.tiles) == 24 * NUM_TILES

    async def test_two_streams_share_a_budget_that_fits_one_picture(self, checkpoint: Path) -> None:
        large = [gradient(seed, 700, 525) for seed in range(4)]  # 5 MiB while decoded
        config = {"pixel_budget_mib": 6, "max_batch_tiles": 2, "decode_workers": 2}
        async with serving(checkpoint, ScriptedVision(), **config) as service:
            calls = [await start(service, large[at : at + 2], initial_credit=26) for at in (0, 2)]
            for call in calls:
                await read_layout(call)
            answers = await asyncio.gather(*(finish(call) for call in calls))
            assert [len(answer.tiles) for answer in answers] == [26, 26]

    async def test_random_ones_leave_nothing(self, checkpoint: Path) -> None:
        vision = ScriptedVision(hidden_size=4096)
        config = {"pixel_budget_mib": 1, "max_batch_tiles": 3, "decode_workers": 2}
        async with serving(checkpoint, vision, **config) as service:
            seeds = range(60)
            outcomes = await asyncio.gather(*(random_stream(service, seed) for seed in seeds))
            await service.until_idle()
            assert outcomes.count("finished") > 10 and outcomes.count("left") > 10
            await works(service)


async def random_stream(service: Service, seed: int) -> str:
    """Upload, grant and read at random, perhaps leave somewhere; who stays gets all that was granted."""
    choose = random.Random(seed)
    await asyncio.sleep(choose.random() / 2)
    pictures = [gradient(choose.randrange(4)) for _ in range(choose.randint(1, 3))]
    credit = choose.choice((0, 0, 2, 30))
    expected = [(medium, tile) for medium in range(len(pictures)) for tile in range(NUM_TILES)][:credit]
    leaving_after = choose.choice((None, 0, 1, 2, 3))
    call = service.stub.Encode(timeout=TIMEOUT_S)
    await send(call, opening(pictures, initial_credit=credit, priority=choose.randint(-2, 2)))
    for index, data in enumerate(pictures):
        if leaving_after == 0 and choose.random() < 0.3:
            return leave_now(call)
        await send(call, chunk(index, data))
    await read_layout(call)
    for step in range(1, 5):
        if leaving_after == step:
            return leave_now(call)
        first = choose.randrange(NUM_TILES)
        count = choose.randint(1, NUM_TILES - first)
        medium = choose.randrange(len(pictures))
        await send(call, grant((medium, first, count)))
        expected += [(medium, tile) for tile in range(first, first + count)]
        await asyncio.sleep(choose.random() / 50)
    assert (await finish(call)).tiles == expected
    return "finished"


def leave_now(call: EncodeCall) -> str:
    call.cancel()
    return "left"


class TestServe:
    async def test_a_running_stream_finishes_within_the_grace_period(self, checkpoint: Path) -> None:
        process = await asyncio.to_thread(ServiceProcess, "encoder", str(checkpoint), "--port", "0")
        try:
            async with open_channel(process.address) as channel, open_channel(process.address) as watching:
                call = EncoderStub(channel).Encode(timeout=TIMEOUT_S)
                await send(call, opening([PICTURE], initial_credit=1), chunk(0, PICTURE))
                await read_layout(call)
                watch = health_pb2_grpc.HealthStub(watching).Watch(
                    health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=TIMEOUT_S
                )
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                process.process.terminate()
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                watch.cancel()
                await send(call, grant((0, 0, 13)))
                answer = await finish(call)
            assert len(answer.tiles) == 14 and answer.timings is not None
            assert await asyncio.to_thread(process.process.wait, 10) == 0
        finally:
            process.kill()

    async def test_a_stream_that_outlasts_the_grace_period_is_ended(self, checkpoint: Path) -> None:
        arguments = ("--port", "0", "--shutdown-grace-s", "0.3")
        process = await asyncio.to_thread(ServiceProcess, "encoder", str(checkpoint), *arguments)
        try:
            async with open_channel(process.address) as channel:
                call = EncoderStub(channel).Encode(timeout=TIMEOUT_S)
                await send(call, opening([PICTURE]), chunk(0, PICTURE))
                await read_layout(call)
                process.process.terminate()
                assert (await refusal(call)).reason in ("unavailable", "cancelled")
            assert await asyncio.to_thread(process.process.wait, 10) == 0
        finally:
            process.kill()


def video_medium(data: bytes, **sampling: Any) -> encoder_pb2.Medium:
    return encoder_pb2.Medium(
        kind=encoder_pb2.MEDIA_KIND_VIDEO,
        num_bytes=len(data),
        sampling=encoder_pb2.FrameSampling(**sampling),
    )


def document_medium(data: bytes, **tiling: Any) -> encoder_pb2.Medium:
    return encoder_pb2.Medium(
        kind=encoder_pb2.MEDIA_KIND_DOCUMENT,
        num_bytes=len(data),
        tiling=encoder_pb2.TilingOptions(**tiling),
    )


def values(answer: Answer) -> dict[tuple[int, int], float]:
    """Of each tile the first element, which is its mean pixel."""
    floats = [float(torch.frombuffer(bytearray(data), dtype=torch.float32)[0]) for data in answer.payloads]
    return dict(zip(answer.tiles, floats, strict=True))


class TestVideosAndDocuments:
    FRAMES = numbered_frames(24)
    MP4 = video(FRAMES)
    PDF = pdf([Image.new("RGB", (280, 140), "white"), Image.new("RGB", (140, 140), "black")])

    async def test_frames_are_tiles_of_one_medium(self, service: Service) -> None:
        media = [video_medium(self.MP4, num_frames=6)]
        call = await start(service, [self.MP4], media=media, initial_credit=2)
        [layout] = (await read_layout(call)).media
        assert [(part.columns, part.rows, part.num_tiles) for part in layout.parts] == [(1, 1, 1)] * 6
        assert [round(part.timestamp_s * 8) for part in layout.parts] == [1, 5, 9, 13, 16, 20]
        assert list(layout.tokens_per_tile) == [1] * 6 and (layout.width, layout.height) == (64, 48)
        await send(call, grant((0, 2, 4)))
        means = values(await finish(call))
        greys = [number_to_grey(number, 24) for number in (1, 5, 9, 13, 16, 20)]
        assert list(means) == [(0, tile) for tile in range(6)]
        assert [means[0, tile] for tile in range(6)] == pytest.approx(greys, abs=3)

    async def test_only_the_granted_frames_come_and_they_are_the_same(self, service: Service) -> None:
        """What a failure of an encoder leaves to be done: its missing tiles, from another one."""
        media = [video_medium(self.MP4, num_frames=24)]
        whole = await start(service, [self.MP4], media=media, initial_credit=24)
        await read_layout(whole)
        expected = values(await finish(whole))
        partial_call = await start(service, [self.MP4], media=media)
        await read_layout(partial_call)
        await send(partial_call, grant((0, 20, 2), (0, 3, 1)))
        some = values(await finish(partial_call))
        assert list(some) == [(0, 20), (0, 21), (0, 3)]
        assert all(expected[tile] == value for tile, value in some.items())

    async def test_pages_are_tiled_like_pictures(self, service: Service) -> None:
        call = await start(service, [self.PDF], media=[document_medium(self.PDF)], initial_credit=99)
        [layout] = (await read_layout(call)).media
        wide, square = layout.parts
        assert (wide.width, wide.height, wide.columns, wide.rows) == (560, 280, 4, 2)
        assert (wide.has_thumbnail, wide.num_tiles, square.columns, square.rows) == (True, 9, 3, 3)
        assert len(layout.tokens_per_tile) == wide.num_tiles + square.num_tiles
        means = values(await finish(call))
        assert [means[0, tile] > 200 for tile in range(19)] == [True] * 9 + [False] * 10

    async def test_kinds_mix_in_one_stream(self, service: Service) -> None:
        picture = encoder_pb2.Medium(kind=encoder_pb2.MEDIA_KIND_IMAGE, num_bytes=len(PICTURE))
        media = [video_medium(self.MP4), picture, document_medium(self.PDF, max_tiles=1)]
        call = await start(service, [self.MP4, PICTURE, self.PDF], media=media, initial_credit=99)
        layout = await read_layout(call)
        counts = [len(medium.tokens_per_tile) for medium in layout.media]
        assert counts == [8, NUM_TILES, 2]
        answer = await finish(call)
        assert answer.tiles == [(medium, tile) for medium in range(3) for tile in range(counts[medium])]
        assert answer.timings is not None and answer.timings.decode_ns > 0

    async def test_the_content_hash_covers_kind_and_sampling(self, service: Service) -> None:
        hashes = set()
        for sampling in ({}, {"num_frames": 4}, {"fps": 2.0}, {"start_s": 1.0}, {"end_s": 2.0}):
            layout = await layout_of(service, [self.MP4], media=[video_medium(self.MP4, **sampling)])
            hashes.add(layout.media[0].content_hash)
        assert len(hashes) == 5
        stated = await layout_of(service, [self.MP4], media=[video_medium(self.MP4, num_frames=8, start_s=0)])
        assert stated.media[0].content_hash in hashes

    @pytest.mark.parametrize(
        ("data", "kind", "message"),
        [
            (b"nonsense", encoder_pb2.MEDIA_KIND_VIDEO, "this is not an MP4, MOV, WebM or Matroska video"),
            (PICTURE, encoder_pb2.MEDIA_KIND_DOCUMENT, "this is not a PDF document"),
            (sound(), encoder_pb2.MEDIA_KIND_VIDEO, "the file has no video stream"),
            (bare_pdf(trailer=LOCK), encoder_pb2.MEDIA_KIND_DOCUMENT, "the PDF is encrypted"),
            (bare_pdf(num_pages=65), encoder_pb2.MEDIA_KIND_DOCUMENT, "the PDF has 65 pages; at most 64"),
        ],
    )
    async def test_a_bad_file_is_named(self, service: Service, data: bytes, kind: Any, message: str) -> None:
        medium = encoder_pb2.Medium(kind=kind, num_bytes=len(data))
        refused = await refusal(await start(service, [data], media=[medium]))
        assert isinstance(refused, InvalidRequest) and refused.field == "media[0].data"
        assert refused.message.startswith(message)
        await works(service)

    async def test_corrupt_frames_are_named_when_they_are_wanted(self, service: Service) -> None:
        begin = self.MP4.index(b"mdat") + 4
        broken = self.MP4[:begin] + bytes(400) + self.MP4[begin + 400 :]
        call = await start(service, [broken], media=[video_medium(broken)], initial_credit=8)
        await read_layout(call)
        refused = await refusal(call)
        assert isinstance(refused, InvalidRequest) and refused.field == "media[0].data"

    async def test_a_caller_that_leaves_takes_its_decoder_along(self, service: Service) -> None:
        await layout_of(service, [self.MP4], media=[video_medium(self.MP4)])
        processes = service.servicer._workers.containers.processes
        [pid] = processes.pids
        os.kill(pid, signal.SIGSTOP)
        call = await start(service, [self.MP4], media=[video_medium(self.MP4)])
        await until(lambda: not processes._idle)
        call.cancel()
        await until(lambda: pid not in processes.pids)
        await service.until_idle()


class TestVideoLimits:
    @pytest.mark.parametrize(
        ("medium", "field"),
        [
            (video_medium(bytes(5001)), "media[0].data"),
            (document_medium(bytes(6001)), "media[0].data"),
            (video_medium(b"x", num_frames=0), "media[0].sampling.num_frames"),
            (video_medium(b"x", num_frames=11), "media[0].sampling.num_frames"),
            (video_medium(b"x", fps=-1), "media[0].sampling.fps"),
            (video_medium(b"x", start_s=2, end_s=1), "media[0].sampling.end_s"),
        ],
    )
    async def test_each_is_named(self, checkpoint: Path, medium: encoder_pb2.Medium, field: str) -> None:
        limits = ContainerLimits(max_video_bytes=5000, max_document_bytes=6000, max_video_frames=10)
        async with serving(checkpoint, ScriptedVision(), container_limits=limits) as service:
            refused = await refusal(await start(service, [], media=[medium]))
            assert isinstance(refused, InvalidRequest) and refused.field == field
