"""Settings of the LLM service.  Words are vLLM's where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.channel import ClientTlsConfig
from protos.directory import parse_target
from protos.options import HEARTBEAT_INTERVAL_S, MAX_MESSAGE_BYTES
from protos.server import ServerConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "sdpa", "cuda", "flash-attn")
CUDA_GRAPHS = ("auto", "off")
QUANTIZATIONS = ("none", "fp8", "fp8-head")
TILE_TRANSPORTS = ("auto", "inline")
TILE_PAYLOADS = ("auto", "fp8")
GENERATION_CONFIGS = ("auto", "none")
# Beside the pictures a request has text and settings.
MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - (1 << 20)


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs; "auto" and 0 are resolved once, when the engine starts."""

    dtype: str = field(
        default="auto", metadata={"help": "element type of weights and KV cache; auto: the checkpoint's"}
    )
    device: str = field(default="auto", metadata={"help": "cpu or cuda; auto: cuda where there is one"})
    load_format: str = field(
        default="auto", metadata={"help": "auto reads the weights, dummy makes random ones on the device"}
    )
    quantization: str = field(
        default="none",
        metadata={
            "help": "fp8: the layers' matrices in float8, made as they are loaded, and the activations of "
            "prefills; fp8-head: the output matrix, too. For GPUs of capability 8.9 and newer; on the CPU it "
            "saves memory and costs much time"
        },
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "engine processes that share each layer"})
    attention_backend: str = field(
        default="auto", metadata={"help": "attention kernels: auto, sdpa, cuda or flash-attn (extra: gpu)"}
    )
    max_model_len: int = field(
        default=0,
        metadata={"help": "most tokens of prompt and completion; 0: the checkpoint's, as memory allows"},
    )
    max_num_seqs: int = field(
        default=0, metadata={"help": "most sequences computed together; 0: 256 on a GPU, 64 on the CPU"}
    )
    max_num_batched_tokens: int = field(
        default=0,
        metadata={
            "help": "token budget of a step, shared by decodes and prefill chunks; "
            "0: 8192 on a GPU, 2048 on the CPU"
        },
    )
    long_prefill_token_threshold: int = field(
        default=0, metadata={"help": "most prompt tokens of one sequence in a step; 0: no limit"}
    )
    enable_encoding_overlap: bool = field(
        default=True,
        metadata={"help": "prefill what is before the first missing tile while tiles are being encoded"},
    )
    overlap_on_shared_gpu: bool = field(
        default=False,
        metadata={
            "help": "also where every encoder computes on the engine's GPU and needs several forwards: there "
            "the two only take turns"
        },
    )
    min_overlap_tokens: int = field(
        default=0,
        metadata={
            "help": "fewest prompt tokens worth a step while the tile behind them is on its way; "
            "0: on a GPU those of the tiles that an idle encoder makes together, at most 1024; 1 on the CPU"
        },
    )
    num_kv_blocks: int = field(
        default=0, metadata={"help": "blocks of the KV cache; 0: from gpu_memory_utilization or kv_cache_gib"}
    )
    gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "share of the GPU's memory that this process may use"}
    )
    cuda_graphs: str = field(
        default="auto",
        metadata={"help": "auto: decode by CUDA graphs where the attention backend can; off: never"},
    )
    kv_cache_gib: float = field(default=2.0, metadata={"help": "KV cache on the CPU, GiB"})
    enable_prefix_caching: bool = field(
        default=True, metadata={"help": "reuse the KV cache of equal prompt prefixes"}
    )
    visual_store_gib: float = field(
        default=0.25, metadata={"help": "shared memory for visual tokens of running and recent requests, GiB"}
    )
    max_waiting: int = field(
        default=1024, metadata={"help": "sequences in the queue before new requests are refused"}
    )
    num_threads: int = field(default=0, metadata={"help": "CPU threads of PyTorch; 0: PyTorch's default"})

    def __post_init__(self) -> None:
        _require_one_of("dtype", self.dtype, DTYPES)
        _require_one_of("device", self.device, DEVICES)
        _require_one_of("load_format", self.load_format, LOAD_FORMATS)
        _require_one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _require_one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        _require_one_of("quantization", self.quantization, QUANTIZATIONS)
        for name in ("tensor_parallel_size", "max_waiting"):
            _require_at_least(name, getattr(self, name), 1)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "long_prefill_token_threshold",
            "min_overlap_tokens",
            "num_kv_blocks",
            "num_threads",
        ):
            _require_at_least(name, getattr(self, name), 0)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        for name in ("kv_cache_gib", "visual_store_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if 0 < self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every decode takes one token"
            )


@dataclass(frozen=True)
class EncoderPoolConfig:
    """How the LLM service uses its encoders."""

    encoders: tuple[str, ...] = field(
        default=("127.0.0.1:50051",),
        metadata={"help": "encoders, HOST:PORT or dns:///NAME:PORT, separated by commas"},
    )
    encoder_tls: ClientTlsConfig = field(default_factory=ClientTlsConfig, metadata={"prefix": "encoder-tls-"})
    tile_transport: str = field(
        default="auto",
        metadata={
            "help": "how visual tokens come; auto: through shared memory from encoders on this host, "
            "inline from others; inline: always in gRPC messages"
        },
    )
    tile_payload: str = field(
        default="auto",
        metadata={
            "help": "element type of visual tokens on their way; auto: the encoder's; fp8: 8 bits with a "
            "scale for each token, which halves the way and changes the tokens a little"
        },
    )
    initial_credit: int = field(
        default=16, metadata={"help": "tiles of a new picture that an encoder may send before it is asked"}
    )
    layout_timeout_s: float = field(
        default=10.0,
        metadata={"help": "seconds an encoder may take to read the headers of a request's pictures"},
    )
    heartbeat_timeout_s: float = field(
        default=0.6,
        metadata={
            "help": "silence after which an encoder counts as dead where another can take over, else ten "
            "times that (it beats every 0.2 s)"
        },
    )
    tile_timeout_s: float = field(
        default=120.0,
        metadata={"help": "seconds without a tile, though some were asked for, before giving up"},
    )

    def __post_init__(self) -> None:
        _require_one_of("tile_transport", self.tile_transport, TILE_TRANSPORTS)
        _require_one_of("tile_payload", self.tile_payload, TILE_PAYLOADS)
        _require_at_least("initial_credit", self.initial_credit, 0)
        if self.heartbeat_timeout_s <= HEARTBEAT_INTERVAL_S:
            raise ValueError(
                f"heartbeat_timeout_s must be > {HEARTBEAT_INTERVAL_S}, got {self.heartbeat_timeout_s}"
            )
        for name in ("layout_timeout_s", "tile_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if any(not target for target in self.encoders):
            raise ValueError("encoders must not contain an empty address")
        for target in self.encoders:
            parse_target(target)


@dataclass(frozen=True)
class UploadConfig:
    """What UploadMedia may leave in memory, and for how long."""

    max_upload_bytes: int = field(default=128 << 20, metadata={"help": "most bytes of one uploaded medium"})
    max_uploads_mib: int = field(
        default=1024, metadata={"help": "memory for uploaded media, MiB; each counts as 64 KiB at least"}
    )
    max_caller_uploads_mib: int = field(
        default=512, metadata={"help": "memory for the uploaded media of one host or TLS identity, MiB"}
    )
    upload_ttl_s: float = field(
        default=300.0, metadata={"help": "seconds that an uploaded medium is kept after it came or was used"}
    )
    upload_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds between two messages of an upload"}
    )

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_uploads_mib", "max_caller_uploads_mib"):
            _require_at_least(name, getattr(self, name), 1)
        for name in ("upload_ttl_s", "upload_timeout_s"):
            if not getattr(self, name) > 0:  # NaN is not
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class LLMConfig:
    model: str = field(default="", metadata={"help": "checkpoint folder or hub id"})
    served_model_name: str = field(
        default="", metadata={"help": "id that clients name; default: the checkpoint as given"}
    )
    generation_config: str = field(
        default="auto",
        metadata={
            "help": "auto: the checkpoint's generation_config.json gives the defaults of temperature, top_p, "
            "top_k, min_p, repetition_penalty and max_tokens; none: those of the file are ignored"
        },
    )
    server: ServerConfig = field(default_factory=lambda: ServerConfig(port=50052))
    encoder_pool: EncoderPoolConfig = field(default_factory=EncoderPoolConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    engine_socket: str = field(
        default="",
        metadata={
            "help": "unix socket of the engine: joined if an engine listens there, else one is started; "
            "empty: a private one"
        },
    )
    engine_timeout_s: float = field(
        default=120.0,
        metadata={
            "help": "seconds without a sign of life from the engine, as in a step that hangs, after which "
            "requests fail and health says NOT_SERVING"
        },
    )
    max_images: int = field(default=64, metadata={"help": "most pictures, videos and documents of a request"})
    max_image_tiles: int = field(
        default=40, metadata={"help": "most tiles that a request may ask for per picture, frame or page"}
    )
    max_video_frames: int = field(
        default=128, metadata={"help": "most frames that a request may ask for per video"}
    )
    max_request_bytes: int = field(default=32 << 20, metadata={"help": "inline media of a request, bytes"})
    uploads: UploadConfig = field(default_factory=UploadConfig)
    request_timeout_s: float = field(
        default=3600.0, metadata={"help": "seconds after which a request is given up, whatever it waits for"}
    )

    def __post_init__(self) -> None:
        _require_one_of("generation_config", self.generation_config, GENERATION_CONFIGS)
        for name in ("max_images", "max_image_tiles", "max_video_frames", "max_request_bytes"):
            _require_at_least(name, getattr(self, name), 1)
        if self.max_request_bytes > MAX_REQUEST_BYTES:
            raise ValueError(
                f"max_request_bytes must be <= {MAX_REQUEST_BYTES}, what a message can carry, "
                f"got {self.max_request_bytes}"
            )
        for name in ("request_timeout_s", "engine_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
