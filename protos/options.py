"""gRPC channel arguments that both ends of a connection must agree on."""

from __future__ import annotations

# Largest message of the contract: a Generate request with 32 MiB of inline pictures and some text.
# One visual tile is at most 256 tokens x 8192 x 4 B = 8 MiB.  A real cap, not -1: it bounds memory.
MAX_MESSAGE_BYTES = 40 << 20
# Chunks of media on an Encode stream; tiles of 512 KiB to 2 MiB are where gRPC moves most bytes a second.
MAX_CHUNK_BYTES = 1 << 20

# Of a URL that the encoder fetches, and the longest that it may be told to take for one.
MAX_URL_CHARS = 2048
MAX_FETCH_S = 60.0

# An encoder that has no tile to send says that it lives; clients count missed beats.
HEARTBEAT_INTERVAL_S = 0.2

KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
# Must be below the clients' KEEPALIVE_TIME_MS, or the server answers pings with too_many_pings.
MIN_PING_INTERVAL_MS = 10_000
# Soft and hard limit equal: between them gRPC rejects at random.
MAX_METADATA_BYTES = 16 << 10

SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_frame_size", 1 << 20),
)
