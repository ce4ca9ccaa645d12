"""The captured tower and its streams, on a real GPU."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_service.batcher import TileBatcher
from encoder_service.config import EncoderConfig
from encoder_service.cuda_vision import CudaVision
from encoder_service.media import ImageLimits, decode_image
from encoder_service.servicer import EncoderServicer
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_slots import TileSlots
from encoder_service.tiling import TileCutter, TilingOptions, plan_tiles
from encoder_service.vision import VisionEncoder
from protos import encoder_pb2
from protos.channel import open_channel
from protos.checkpoint import Checkpoint
from protos.encoder_rpc import SERVICE_NAME, EncoderStub, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.ring import Ring, RingGeometry, RingReader
from protos.server import Server, ServerConfig
from tests.encoder_service.conftest import KINDS, hf_config, hf_tensors
from tests.encoder_service.wire import Answer, Service, finish, read_layout, start, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIDE = 56
MAX_TILES = 13


@pytest.fixture(params=KINDS)
def checkpoint(references, write_checkpoint: Callable[..., Checkpoint], request) -> Checkpoint:
    model = references[request.param]
    return write_checkpoint(hf_config(model), hf_tensors(model))


def random_tiles(num_tiles: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return torch.randint(0, 256, (num_tiles, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def picture(seed: int, width: int = 4 * SIDE, height: int = 3 * SIDE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def cpu_tiles(data: bytes) -> torch.Tensor:
    image = decode_image(data, ImageLimits(), "data")
    plan = plan_tiles(*image.size, TilingOptions(1, 12, True), SIDE)
    return TileCutter(image, plan, SIDE).cut(range(plan.num_tiles))


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0))


def test_every_number_of_tiles_gives_what_the_cpu_gives_in_fp32(checkpoint: Checkpoint) -> None:
    exact = VisionEncoder.load(checkpoint, "cpu")
    vision = CudaVision(VisionEncoder.load(checkpoint, "cuda"), MAX_TILES)
    for num_tiles in (*range(1, MAX_TILES + 1), 30):
        tiles = random_tiles(num_tiles)
        torch.testing.assert_close(vision.encode(tiles), exact.encode(tiles), atol=1e-3, rtol=1e-3)


def test_in_bfloat16_graph_and_eager_are_near_fp32_on_the_cpu(checkpoint: Checkpoint) -> None:
    tiles = random_tiles(7)
    exact = VisionEncoder.load(checkpoint, "cpu", dtype="float32").encode(tiles)
    eager = VisionEncoder.load(checkpoint, "cuda", dtype="bfloat16")
    graph = CudaVision(eager, MAX_TILES).encode(tiles)
    assert graph.dtype is torch.bfloat16
    # These weights are far wilder than a trained model's: eager itself is what rounding allows.
    assert 1 - cosine(graph, exact) <= max(1e-4, 1.5 * (1 - cosine(eager.encode(tiles), exact)))
    assert cosine(graph, eager.encode(tiles)) >= 0.999


def test_a_real_sized_tower_in_bfloat16_is_within_1e_4_of_fp32() -> None:
    from encoder_service.timing import TOWERS, make_encoder

    encoder = make_encoder(TOWERS["InternViT-300M"], torch.device("cuda"), weight_scale=0.02)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (3, 3, 448, 448), dtype=torch.uint8, generator=generator)
    graph = CudaVision(encoder, 4).encode(tiles)
    encoder.model.float()
    reference = VisionEncoder(encoder.model, encoder.config, encoder.preprocessing).encode(tiles)
    assert reference.float().std() > 0
    assert cosine(graph, reference) >= 0.9999


def test_forwards_in_flight_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    vision = CudaVision(VisionEncoder.load(checkpoint, "cuda"), MAX_TILES)
    batches = [random_tiles(1 + index % MAX_TILES) for index in range(40)]
    expected = [vision.encode(batch) for batch in batches]
    on_gpu = [batch.cuda() for batch in batches]
    torch.cuda.synchronize()
    forwards = [vision.launch(list(batch)) for batch in on_gpu]
    for forward, embeds in zip(forwards, expected, strict=True):
        result = forward.result()
        torch.testing.assert_close(torch.stack(list(result.embeds)), embeds, atol=1e-4, rtol=1e-4)
        assert result.encode_ns > 0 and result.transfer_ns > 0
        assert all(tile.is_pinned() for tile in result.embeds)


async def test_the_service_gives_the_cpus_embeds_for_many_streams_at_a_time(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    exact = VisionEncoder.load(checkpoint, "cpu")
    eager = VisionEncoder.load(checkpoint, "cuda")
    gpu = CudaVision(eager, 32, cache_bytes=1 << 20)
    config = EncoderConfig(model="a model", decode_workers=4, device_cache_mib=1)
    servicer = EncoderServicer(config, FingerprintBase(checkpoint), eager, gpu)
    server = Server(ServerConfig(shutdown_grace_s=0), [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    port = await server.start()
    pictures = [
        picture(seed, *size) for seed, size in enumerate([(224, 168), (56, 56), (300, 500), (640, 100)])
    ]
    expected = torch.cat([exact.encode(cpu_tiles(data)) for data in pictures])
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            service = Service(servicer, server, channel, EncoderStub(channel), 0)
            answers = await asyncio.gather(*(ask(service, pictures, bytes([salt])) for salt in range(12)))
            again = await asyncio.gather(*(ask(service, pictures, bytes([salt])) for salt in range(12)))
    finally:
        await server.stop()
        await asyncio.to_thread(servicer.close)
    for answer in answers:
        embeds = torch.frombuffer(bytearray(b"".join(answer.payloads)), dtype=torch.float32)
        torch.testing.assert_close(embeds.view(expected.shape), expected, atol=1e-3, rtol=1e-3)
        timings = answer.timings
        assert timings is not None
        assert min(timings.decode_ns, timings.tile_ns, timings.encode_ns, timings.total_ns) > 0
    for answer, first in zip(again, answers, strict=True):
        assert answer.payloads == first.payloads
        timings = answer.timings
        assert timings is not None and timings.decode_ns == timings.tile_ns == timings.encode_ns == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_forwards_leave_tiles_on_the_gpu_where_it_has_a_cache(checkpoint: Checkpoint) -> None:
    encoder = VisionEncoder.load(checkpoint, "cuda")
    tiles = list(random_tiles(MAX_TILES).cuda())
    torch.cuda.synchronize()
    assert len(CudaVision(encoder, MAX_TILES).launch(tiles).result().on_device) == 0
    vision = CudaVision(encoder, MAX_TILES, cache_bytes=1 << 16)
    result = vision.launch(tiles).result()
    for _ in range(20):  # what the first forward has left is its own
        vision.launch(tiles[::-1]).result()
    assert len(result.on_device) == MAX_TILES
    for on_device, host in zip(result.on_device, result.embeds, strict=True):
        assert on_device.is_cuda and on_device.untyped_storage().nbytes() == on_device.nbytes
        copy = vision.to_host(on_device)
        assert copy.is_pinned() and copy.data_ptr() != host.data_ptr() and torch.equal(copy, host)
        assert vision.to_host(host) is host


def test_the_caches_memory_is_taken_at_the_start(checkpoint: Checkpoint) -> None:
    encoder = VisionEncoder.load(checkpoint, "cuda")
    grown, kept = [], []
    for cache_bytes in (0, 0, 64 << 20):  # the first one lets libraries take theirs
        before = torch.cuda.memory_reserved()
        kept.append(CudaVision(encoder, MAX_TILES, cache_bytes))
        grown.append(torch.cuda.memory_reserved() - before)
    assert grown[2] - grown[1] >= 48 << 20


async def test_tiles_on_the_gpu_and_those_that_moved_to_the_host_are_what_the_forward_gave(
    checkpoint: Checkpoint,
) -> None:
    vision = CudaVision(VisionEncoder.load(checkpoint, "cuda"), MAX_TILES, cache_bytes=1 << 16)
    tiles = random_tiles(10)
    expected = vision.encode(tiles)
    cache = TileCache(1 << 20, 4 * expected[0].nbytes, vision.to_host)
    batcher = TileBatcher(vision.encode, vision.batch_sizes, launch=vision.launch)
    flights = TileFlights(batcher, cache)
    try:
        for number, pixels in enumerate(tiles.cuda()):
            claim = flights.claim((b"", b"", number), (0,), lambda claim: None)
            torch.cuda.synchronize()
            flights.submit(claim, pixels)
            torch.testing.assert_close((await claim.result).embeds, expected[number], atol=1e-4, rtol=1e-4)
        assert (len(cache.device), len(cache.host)) == (4, 6)
        for number in range(10):
            found = cache.find((b"", b"", number))
            assert found is not None
            torch.testing.assert_close(await found, expected[number], atol=1e-4, rtol=1e-4)
        await until(lambda: not cache.find((b"", b"", 5)).result().is_pinned())
    finally:
        await asyncio.to_thread(batcher.close)
        await asyncio.to_thread(cache.close)


async def ask(service: Service, pictures: list[bytes], salt: bytes) -> Answer:
    call = await start(service, pictures, initial_credit=100, cache_salt=salt)
    await read_layout(call)
    return await finish(call)


async def test_a_ring_has_the_embeds_that_go_inline(checkpoint: Checkpoint) -> None:
    """The GPU writes them where a front end reads them."""
    eager = VisionEncoder.load(checkpoint, "cuda")
    slots = TileSlots(Ring.create(RingGeometry(8, 1 << 18)))
    servicer = EncoderServicer(
        EncoderConfig(model="a model", host_cache_mib=0, device_cache_mib=0),
        FingerprintBase(checkpoint),
        eager,
        CudaVision(eager, 32, slots=slots),
        slots=slots,
    )
    server = Server(ServerConfig(shutdown_grace_s=0), [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.start()
    port = await server.start()
    data = picture(2, 300, 500)
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            service = Service(servicer, server, channel, EncoderStub(channel), 0)
            inline = await ask(service, [data], b"inline")
            reader = await map_ring(await service.stub.Attach(encoder_pb2.AttachRequest()))
            call = await start(service, [data], initial_credit=100, ring_nonce=reader.nonce)
            layout = await read_layout(call)
            assert layout.transport == encoder_pb2.TRANSPORT_SHARED_MEMORY
            num_read = 0
            while num_read < min(4, len(inline.tiles)):
                event = await call.read()
                for tile in event.tiles.tiles:
                    payload = inline.payloads[inline.tiles.index((tile.medium, tile.tile))]
                    ours = torch.frombuffer(
                        bytearray(reader.slot(tile.slot)[: len(payload)]), dtype=torch.float32
                    )
                    assert reader.sequence(tile.slot) == tile.sequence
                    expected = torch.frombuffer(bytearray(payload), dtype=torch.float32)
                    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
                    num_read += 1
            call.cancel()
    finally:
        await server.stop()
        await servicer.stop()


def test_a_tile_in_a_slot_is_page_locked() -> None:
    """So its copy does not wait for the GPU."""
    slots = TileSlots(Ring.create(RingGeometry(8, 1 << 18)))
    slots.pin()
    tile = slots.new_tile((16, 64), torch.float32)
    assert tile is not None and tile.is_pinned()
    values = torch.randn(16, 64, device="cuda")
    tile.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(tile, values.cpu())
    slots.close()
    assert not tile.is_pinned()


async def map_ring(response: encoder_pb2.AttachResponse) -> RingReader:
    geometry = RingGeometry(response.num_slots, response.slot_bytes)
    return await asyncio.to_thread(RingReader.receive, response.name, geometry)
