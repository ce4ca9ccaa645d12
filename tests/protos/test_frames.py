"""The copy-saving serialisers emit and read exactly protobuf's bytes."""

from __future__ import annotations

import random
import time

import pytest
from google.protobuf.message import DecodeError

from protos import encoder_pb2
from protos.frames import EncodeEvent, TileFrame, deserialize_event, serialize_event

# Around every length of a varint, and a real tile.
SIZES = [0, 1, 2, 100, 110, 119, 120, 121, 126, 127, 128, 129, 16_370, 16_383, 16_384, 2_097_140, 2_097_152]


def payload(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def as_message(medium: int, tile: int, num_tokens: int, data: bytes) -> encoder_pb2.EncodeResponse:
    return encoder_pb2.EncodeResponse(
        tile=encoder_pb2.Tile(medium=medium, tile=tile, num_tokens=num_tokens, data=data)
    )


def as_frame(medium: int, tile: int, num_tokens: int, data: bytes) -> TileFrame:
    header = encoder_pb2.Tile(medium=medium, tile=tile, num_tokens=num_tokens)
    return TileFrame(header, memoryview(data))


def assert_same(event: EncodeEvent, expected: encoder_pb2.Tile) -> None:
    assert isinstance(event, TileFrame)
    numbers = (event.tile.medium, event.tile.tile, event.tile.num_tokens)
    assert numbers == (expected.medium, expected.tile, expected.num_tokens)
    assert event.tile.data == b"" and bytes(event.payload) == expected.data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 12, 256), (1, 0, 64), (300, 2**32 - 1, 16_384)])
def test_frames_are_protobuf_bytes(size: int, numbers: tuple[int, int, int]) -> None:
    data = payload(size)
    message = as_message(*numbers, data)
    wire = serialize_event(as_frame(*numbers, data))
    assert encoder_pb2.EncodeResponse.FromString(wire) == message
    if size:  # protobuf leaves an empty payload out; both spellings mean the same
        assert wire == message.SerializeToString()
    assert_same(deserialize_event(wire), message.tile)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_that_protobuf_serialised_are_read(size: int) -> None:
    message = as_message(3, 7, 256, payload(size))
    assert_same(deserialize_event(message.SerializeToString()), message.tile)


def test_a_received_payload_is_a_view_into_the_received_bytes() -> None:
    wire = serialize_event(as_frame(0, 1, 256, payload(1000)))
    event = deserialize_event(wire)
    assert isinstance(event, TileFrame) and event.payload.obj is wire


def test_a_payload_of_wider_elements_counts_in_bytes() -> None:
    wide = memoryview(payload(64)).cast("f", (4, 4))
    wire = serialize_event(TileFrame(encoder_pb2.Tile(num_tokens=4), wide))
    assert encoder_pb2.EncodeResponse.FromString(wire).tile.data == payload(64)


@pytest.mark.parametrize(
    "event",
    [
        encoder_pb2.EncodeResponse(layout=encoder_pb2.Layout(hidden_size=64)),
        encoder_pb2.EncodeResponse(heartbeat=encoder_pb2.Heartbeat(forwards_done=3, tiles_queued=1)),
        encoder_pb2.EncodeResponse(done=encoder_pb2.Done()),
        encoder_pb2.EncodeResponse(),
    ],
)
def test_other_events_pass_unchanged(event: encoder_pb2.EncodeResponse) -> None:
    wire = serialize_event(event)
    assert wire == event.SerializeToString()
    assert deserialize_event(wire) == event


def test_fields_in_another_order_are_read() -> None:
    """Protobuf allows any order; other languages' writers may use it."""
    head = encoder_pb2.Tile(medium=1, tile=2).SerializeToString()
    tail = encoder_pb2.Tile(data=payload(50)).SerializeToString()
    tile = tail + head
    wire = bytes([15 << 3 | 2, len(tile)]) + tile
    assert_same(deserialize_event(wire), as_message(1, 2, 0, payload(50)).tile)


def test_a_field_of_a_newer_contract_is_skipped() -> None:
    newer = bytes([9 << 3 | 2, 3]) + b"new" + encoder_pb2.Tile(tile=4, data=payload(20)).SerializeToString()
    wire = bytes([15 << 3 | 2, len(newer)]) + newer
    assert_same(deserialize_event(wire), as_message(0, 4, 0, payload(20)).tile)


def test_truncated_frames_raise_protobufs_error_or_read_as_protobuf_reads_them() -> None:
    wire = serialize_event(as_frame(1, 200, 256, payload(300)))
    for length in range(len(wire)):
        assert_reads_as_protobuf(wire[:length])


def test_garbage_raises_protobufs_error_or_reads_as_protobuf_reads_it() -> None:
    rng = random.Random(4)
    good = serialize_event(as_frame(1, 200, 256, payload(40)))
    for _ in range(20_000):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert_reads_as_protobuf(bytes(damaged))
        assert_reads_as_protobuf(rng.randbytes(rng.randint(0, 40)))


def test_an_endless_varint_is_refused_at_once() -> None:
    start = time.monotonic()
    for head in (b"", bytes([8]), bytes([3, 8])):
        assert_reads_as_protobuf(bytes([15 << 3 | 2]) + head + b"\xff" * (1 << 19))
    assert time.monotonic() - start < 1


def assert_reads_as_protobuf(data: bytes) -> None:
    try:
        expected = encoder_pb2.EncodeResponse.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            deserialize_event(data)
        return
    event = deserialize_event(data)
    if expected.WhichOneof("event") == "tile":
        assert_same(event, expected.tile)
    else:
        assert event == expected
