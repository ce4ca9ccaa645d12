from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_INLINE: _ClassVar[Transport]
    TRANSPORT_SHARED_MEMORY: _ClassVar[Transport]

class MediaKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEDIA_KIND_UNSPECIFIED: _ClassVar[MediaKind]
    MEDIA_KIND_IMAGE: _ClassVar[MediaKind]
    MEDIA_KIND_VIDEO: _ClassVar[MediaKind]
    MEDIA_KIND_DOCUMENT: _ClassVar[MediaKind]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_INLINE: Transport
TRANSPORT_SHARED_MEMORY: Transport
MEDIA_KIND_UNSPECIFIED: MediaKind
MEDIA_KIND_IMAGE: MediaKind
MEDIA_KIND_VIDEO: MediaKind
MEDIA_KIND_DOCUMENT: MediaKind

class EncodeRequest(_message.Message):
    __slots__ = ("open", "chunk", "grant")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    chunk: MediaChunk
    grant: Grant
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., chunk: _Optional[_Union[MediaChunk, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("request_id", "media", "payload_dtypes", "transports", "initial_credit", "cache_salt", "priority", "expected_fingerprint", "ring_nonce")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DTYPES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_CREDIT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RING_NONCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    media: _containers.RepeatedCompositeFieldContainer[Medium]
    payload_dtypes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.DType]
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    initial_credit: int
    cache_salt: bytes
    priority: int
    expected_fingerprint: bytes
    ring_nonce: bytes
    def __init__(self, request_id: _Optional[str] = ..., media: _Optional[_Iterable[_Union[Medium, _Mapping]]] = ..., payload_dtypes: _Optional[_Iterable[_Union[_tensor_pb2.DType, str]]] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., initial_credit: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., expected_fingerprint: _Optional[bytes] = ..., ring_nonce: _Optional[bytes] = ...) -> None: ...

class Medium(_message.Message):
    __slots__ = ("kind", "num_bytes", "url", "tiling", "sampling")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    kind: MediaKind
    num_bytes: int
    url: str
    tiling: TilingOptions
    sampling: FrameSampling
    def __init__(self, kind: _Optional[_Union[MediaKind, str]] = ..., num_bytes: _Optional[int] = ..., url: _Optional[str] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ..., sampling: _Optional[_Union[FrameSampling, _Mapping]] = ...) -> None: ...

class FrameSampling(_message.Message):
    __slots__ = ("num_frames", "fps", "start_s", "end_s")
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    fps: float
    start_s: float
    end_s: float
    def __init__(self, num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ...) -> None: ...

class TilingOptions(_message.Message):
    __slots__ = ("min_tiles", "max_tiles", "use_thumbnail")
    MIN_TILES_FIELD_NUMBER: _ClassVar[int]
    MAX_TILES_FIELD_NUMBER: _ClassVar[int]
    USE_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    def __init__(self, min_tiles: _Optional[int] = ..., max_tiles: _Optional[int] = ..., use_thumbnail: bool = ...) -> None: ...

class MediaChunk(_message.Message):
    __slots__ = ("medium", "data")
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    medium: int
    data: bytes
    def __init__(self, medium: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("tiles", "slots")
    TILES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    tiles: _containers.RepeatedCompositeFieldContainer[TileRange]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tiles: _Optional[_Iterable[_Union[TileRange, _Mapping]]] = ..., slots: _Optional[_Iterable[int]] = ...) -> None: ...

class TileRange(_message.Message):
    __slots__ = ("medium", "first_tile", "num_tiles")
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TILE_FIELD_NUMBER: _ClassVar[int]
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    medium: int
    first_tile: int
    num_tiles: int
    def __init__(self, medium: _Optional[int] = ..., first_tile: _Optional[int] = ..., num_tiles: _Optional[int] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("layout", "heartbeat", "done", "tiles", "tile")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    TILE_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    heartbeat: Heartbeat
    done: Done
    tiles: TilesInSlots
    tile: Tile
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., tiles: _Optional[_Union[TilesInSlots, _Mapping]] = ..., tile: _Optional[_Union[Tile, _Mapping]] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("media", "hidden_size", "dtype", "transport")
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    media: _containers.RepeatedCompositeFieldContainer[MediumLayout]
    hidden_size: int
    dtype: _tensor_pb2.DType
    transport: Transport
    def __init__(self, media: _Optional[_Iterable[_Union[MediumLayout, _Mapping]]] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., transport: _Optional[_Union[Transport, str]] = ...) -> None: ...

class MediumLayout(_message.Message):
    __slots__ = ("content_hash", "width", "height", "columns", "rows", "has_thumbnail", "tokens_per_tile", "final", "parts")
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HAS_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    content_hash: bytes
    width: int
    height: int
    columns: int
    rows: int
    has_thumbnail: bool
    tokens_per_tile: _containers.RepeatedScalarFieldContainer[int]
    final: bool
    parts: _containers.RepeatedCompositeFieldContainer[PartLayout]
    def __init__(self, content_hash: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., columns: _Optional[int] = ..., rows: _Optional[int] = ..., has_thumbnail: bool = ..., tokens_per_tile: _Optional[_Iterable[int]] = ..., final: bool = ..., parts: _Optional[_Iterable[_Union[PartLayout, _Mapping]]] = ...) -> None: ...

class PartLayout(_message.Message):
    __slots__ = ("width", "height", "columns", "rows", "has_thumbnail", "num_tiles", "timestamp_s")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HAS_THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_S_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    columns: int
    rows: int
    has_thumbnail: bool
    num_tiles: int
    timestamp_s: float
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., columns: _Optional[int] = ..., rows: _Optional[int] = ..., has_thumbnail: bool = ..., num_tiles: _Optional[int] = ..., timestamp_s: _Optional[float] = ...) -> None: ...

class Tile(_message.Message):
    __slots__ = ("medium", "tile", "num_tokens", "slot", "sequence", "data")
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    TILE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    medium: int
    tile: int
    num_tokens: int
    slot: int
    sequence: int
    data: bytes
    def __init__(self, medium: _Optional[int] = ..., tile: _Optional[int] = ..., num_tokens: _Optional[int] = ..., slot: _Optional[int] = ..., sequence: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TilesInSlots(_message.Message):
    __slots__ = ("tiles",)
    TILES_FIELD_NUMBER: _ClassVar[int]
    tiles: _containers.RepeatedCompositeFieldContainer[Tile]
    def __init__(self, tiles: _Optional[_Iterable[_Union[Tile, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("forwards_done", "tiles_queued")
    FORWARDS_DONE_FIELD_NUMBER: _ClassVar[int]
    TILES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    forwards_done: int
    tiles_queued: int
    def __init__(self, forwards_done: _Optional[int] = ..., tiles_queued: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("timings",)
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    timings: EncodeTimings
    def __init__(self, timings: _Optional[_Union[EncodeTimings, _Mapping]] = ...) -> None: ...

class EncodeTimings(_message.Message):
    __slots__ = ("decode_ns", "tile_ns", "queue_ns", "encode_ns", "total_ns")
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    TILE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    decode_ns: int
    tile_ns: int
    queue_ns: int
    encode_ns: int
    total_ns: int
    def __init__(self, decode_ns: _Optional[int] = ..., tile_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., encode_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("name", "num_slots", "slot_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_slots: int
    slot_bytes: int
    def __init__(self, name: _Optional[str] = ..., num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class GetEncoderModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEncoderModelResponse(_message.Message):
    __slots__ = ("model", "fingerprint", "compute_dtype", "payload_dtype", "hidden_size", "tokens_per_tile", "tiling", "max_tiles", "max_media", "max_media_bytes", "max_pixels", "tiles_queued", "streams_open", "max_video_bytes", "max_video_frames", "max_document_bytes", "max_pages", "payload_dtypes", "gpu_uuid", "batch_tiles", "first_batch_tiles")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    MAX_TILES_FIELD_NUMBER: _ClassVar[int]
    MAX_MEDIA_FIELD_NUMBER: _ClassVar[int]
    MAX_MEDIA_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    TILES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    STREAMS_OPEN_FIELD_NUMBER: _ClassVar[int]
    MAX_VIDEO_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_VIDEO_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_DOCUMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DTYPES_FIELD_NUMBER: _ClassVar[int]
    GPU_UUID_FIELD_NUMBER: _ClassVar[int]
    BATCH_TILES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BATCH_TILES_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: bytes
    compute_dtype: _tensor_pb2.DType
    payload_dtype: _tensor_pb2.DType
    hidden_size: int
    tokens_per_tile: int
    tiling: TilingOptions
    max_tiles: int
    max_media: int
    max_media_bytes: int
    max_pixels: int
    tiles_queued: int
    streams_open: int
    max_video_bytes: int
    max_video_frames: int
    max_document_bytes: int
    max_pages: int
    payload_dtypes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.DType]
    gpu_uuid: str
    batch_tiles: int
    first_batch_tiles: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., compute_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., payload_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., hidden_size: _Optional[int] = ..., tokens_per_tile: _Optional[int] = ..., tiling: _Optional[_Union[TilingOptions, _Mapping]] = ..., max_tiles: _Optional[int] = ..., max_media: _Optional[int] = ..., max_media_bytes: _Optional[int] = ..., max_pixels: _Optional[int] = ..., tiles_queued: _Optional[int] = ..., streams_open: _Optional[int] = ..., max_video_bytes: _Optional[int] = ..., max_video_frames: _Optional[int] = ..., max_document_bytes: _Optional[int] = ..., max_pages: _Optional[int] = ..., payload_dtypes: _Optional[_Iterable[_Union[_tensor_pb2.DType, str]]] = ..., gpu_uuid: _Optional[str] = ..., batch_tiles: _Optional[int] = ..., first_batch_tiles: _Optional[int] = ...) -> None: ...
