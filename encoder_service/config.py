"""Settings of the encoder service."""

from __future__ import annotations

from dataclasses import dataclass, field

from encoder_service.container_limits import ContainerLimits
from encoder_service.fetch_limits import FetchLimits
from encoder_service.media import ImageLimits
from protos.server import ServerConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
CPU_BATCH_TILES = 2
# Of the tile ring. On a GPU tiles are finished there: those of several forwards, and all not sent yet.
CPU_SLOTS = 32
GPU_SLOTS = 256


@dataclass(frozen=True)
class EncoderConfig:
    model: str = field(default="", metadata={"help": "checkpoint folder or hub id"})
    server: ServerConfig = field(default_factory=lambda: ServerConfig(port=50051))
    dtype: str = field(default="auto", metadata={"help": "element type of the tower; auto: the checkpoint's"})
    device: str = field(default="auto", metadata={"help": "cpu or cuda; auto: cuda where there is one"})
    load_format: str = field(
        default="auto", metadata={"help": "auto reads the weights, dummy makes random ones on the device"}
    )
    max_batch_tiles: int = field(
        default=0,
        metadata={
            "help": f"most tiles of one forward; 0: {CPU_BATCH_TILES} on the CPU, on a GPU as measured"
        },
    )
    first_batch_tiles: int = field(
        default=0,
        metadata={
            "help": "most tiles of a forward that finds the GPU's tower idle: the language model can begin "
            "with these while the others are computed; 0: measured at the start"
        },
    )
    num_threads: int = field(default=0, metadata={"help": "CPU threads of PyTorch; 0: PyTorch's default"})
    decode_workers: int = field(default=4, metadata={"help": "threads that decode and cut pictures"})
    pixel_budget_mib: int = field(
        default=1024, metadata={"help": "memory for decoded media of all streams, MiB"}
    )
    host_cache_mib: int = field(
        default=1024, metadata={"help": "memory for visual tokens of recent tiles, MiB; 0: none are kept"}
    )
    device_cache_mib: int = field(
        default=256,
        metadata={
            "help": "GPU memory for visual tokens of the latest tiles, MiB, taken at the start; 0: none"
        },
    )
    max_streams: int = field(default=256, metadata={"help": "most Encode streams at a time"})
    max_media: int = field(default=64, metadata={"help": "most media of one stream"})
    max_stream_bytes: int = field(default=128 << 20, metadata={"help": "most bytes of one stream's media"})
    max_tiles: int = field(
        default=40, metadata={"help": "most tiles that a request may ask for per picture, frame or page"}
    )
    upload_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds between two messages of a stream's upload"}
    )
    idle_timeout_s: float = field(
        default=120.0, metadata={"help": "seconds that a stream with no tile to come may grant none"}
    )
    forward_timeout_s: float = field(
        default=120.0,
        metadata={"help": "seconds without a finished forward after which a tower with tiles counts as hung"},
    )
    tile_ring_mib: int = field(
        default=512,
        metadata={
            "help": "most of the memory in which language models of this host read tiles, MiB; at most "
            f"{CPU_SLOTS} tiles, on a GPU {GPU_SLOTS}; 0: none, all tiles go in messages"
        },
    )
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    container_limits: ContainerLimits = field(default_factory=ContainerLimits)
    fetch_limits: FetchLimits = field(default_factory=FetchLimits)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.tile_ring_mib < 0:
            raise ValueError(f"tile_ring_mib must be >= 0, got {self.tile_ring_mib}")
        if self.load_format not in LOAD_FORMATS:
            raise ValueError(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        for name in (
            "decode_workers",
            "pixel_budget_mib",
            "max_streams",
            "max_media",
            "max_stream_bytes",
            "max_tiles",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in (
            "max_batch_tiles",
            "first_batch_tiles",
            "num_threads",
            "host_cache_mib",
            "device_cache_mib",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("upload_timeout_s", "idle_timeout_s", "forward_timeout_s"):
            if not getattr(self, name) > 0:  # NaN is not
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
