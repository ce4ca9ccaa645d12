"""Serialisers of EncodeResponse, whose tiles are the large payload, that avoid most of protobuf's copies.

They emit and read exactly protobuf's bytes, so every other language keeps its generated client.  A Tile's
payload is its last field: the message is header bytes joined with the payload (one copy), and on arrival
the payload is a view into the received bytes (none).  Protobuf itself needs five copies and four.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos import encoder_pb2

_LENGTH_DELIMITED = 2
_MAX_VARINT_BYTES = 10  # 64 bits, 7 a byte
_TILE_FIELD = encoder_pb2.EncodeResponse.TILE_FIELD_NUMBER
_DATA_FIELD = encoder_pb2.Tile.DATA_FIELD_NUMBER
_TILE_TAG = bytes([_TILE_FIELD << 3 | _LENGTH_DELIMITED])
_DATA_TAG = bytes([_DATA_FIELD << 3 | _LENGTH_DELIMITED])
# Tags stay one byte up to field 15.
assert _TILE_FIELD <= 15 and _DATA_FIELD <= 15


@dataclass(frozen=True)
class TileFrame:
    """A tile whose payload is outside the protobuf message; `tile.data` is empty."""

    tile: encoder_pb2.Tile
    payload: memoryview  # row-major [num_tokens, hidden_size] in Layout.dtype


EncodeEvent = encoder_pb2.EncodeResponse | TileFrame


def serialize_event(event: EncodeEvent) -> bytes:
    """Bytes of `EncodeResponse`, for a server's stream."""
    if not isinstance(event, TileFrame):
        return event.SerializeToString()
    header = event.tile.SerializeToString() + _DATA_TAG + _varint(event.payload.nbytes)
    length = _varint(len(header) + event.payload.nbytes)
    return b"".join((_TILE_TAG, length, header, event.payload))


def deserialize_event(data: bytes) -> EncodeEvent:
    """An EncodeResponse, or a TileFrame over `data`; any other layout of the same message is read too."""
    if data[:1] == _TILE_TAG:
        length, start = _read_varint(data, 1)
        payload_tag = _find_payload(data, start)
        if start + length == len(data) and payload_tag is not None:
            size, payload_start = _read_varint(data, payload_tag + 1)
            if payload_start + size == len(data):
                tile = encoder_pb2.Tile.FromString(data[start:payload_tag])
                return TileFrame(tile, memoryview(data)[payload_start:])
    return _generic(encoder_pb2.EncodeResponse.FromString(data))


def _generic(response: encoder_pb2.EncodeResponse) -> EncodeEvent:
    if response.WhichOneof("event") != "tile":
        return response
    payload = memoryview(response.tile.data)
    response.tile.ClearField("data")
    return TileFrame(response.tile, payload)


def _find_payload(data: bytes, position: int) -> int | None:
    """Position of the payload's tag, if only varint fields stand before it."""
    while position < len(data):
        if data[position : position + 1] == _DATA_TAG:
            return position
        if data[position] & 0x87:  # a longer tag, or no varint
            return None
        _, position = _read_varint(data, position + 1)
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, next position); (-1, the data's end), which fits no length, for a truncated or endless one."""
    value = 0
    for length, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * length
        if byte < 0x80:
            return value, position + length + 1
    return -1, len(data)
