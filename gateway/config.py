"""What the gateway is told at start.  Validation names the field and the value."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.access_config import AccessConfig
from protos.channel import ClientTlsConfig
from protos.directory import parse_target


@dataclass(frozen=True)
class GatewayConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    gateway_workers: int = field(default=1, metadata={"help": "gateway processes that share the port"})
    llm: tuple[str, ...] = field(
        default=("127.0.0.1:50052",),
        metadata={"help": "language-model services, HOST:PORT or dns:///NAME:PORT, separated by commas"},
    )
    llm_tls: ClientTlsConfig = field(default_factory=ClientTlsConfig, metadata={"prefix": "llm-tls-"})
    max_body_bytes: int = field(default=64 << 20, metadata={"help": "largest request body, bytes"})
    max_images: int = field(default=32, metadata={"help": "most pictures, videos and documents of a request"})
    request_timeout_s: float = field(default=600.0, metadata={"help": "seconds that one request may take"})
    body_timeout_s: float = field(
        default=60.0, metadata={"help": "seconds that a client has to send its request body"}
    )
    header_timeout_s: float = field(
        default=10.0, metadata={"help": "seconds that a client has to send a request's headers"}
    )
    write_timeout_s: float = field(
        default=60.0, metadata={"help": "seconds that a client may leave what was sent to it unread"}
    )
    tls_cert: str = field(default="", metadata={"help": "PEM file of the gateway's certificate chain"})
    tls_key: str = field(default="", metadata={"help": "PEM file of the gateway's private key"})
    access: AccessConfig = field(default_factory=AccessConfig)
    model_timeout_s: float = field(
        default=2.0, metadata={"help": "seconds that a language-model service has to say what it serves"}
    )
    also_reasoning: bool = field(
        default=False, metadata={"help": "call what a model thinks `reasoning`, too, as vLLM does"}
    )
    keepalive_s: float = field(
        default=10.0, metadata={"help": "seconds of silence before a stream sends a keep-alive comment"}
    )
    shutdown_grace_s: float = field(
        default=30.0, metadata={"help": "seconds that running requests may take after SIGTERM"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0..65535, got {self.port}")
        if not self.llm or not all(self.llm):
            raise ValueError(f"llm must name at least one service and no empty one, got {self.llm}")
        for target in self.llm:
            parse_target(target)
        for name in (
            "gateway_workers",
            "max_body_bytes",
            "max_images",
            "request_timeout_s",
            "body_timeout_s",
            "header_timeout_s",
            "write_timeout_s",
            "model_timeout_s",
            "keepalive_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together")
        if self.shutdown_grace_s < 0:
            raise ValueError(f"shutdown_grace_s must be >= 0, got {self.shutdown_grace_s}")
