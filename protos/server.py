"""The one way to run a gRPC server: limits, health per service, reflection, TLS, metrics, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.metrics import MetricsInterceptor, start_metrics_server
from protos.options import KEEPALIVE_TIME_MS, MIN_PING_INTERVAL_MS, SHARED_OPTIONS

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=0, metadata={"help": "port to listen on; 0 takes a free one"})
    metrics_port: int = field(
        default=-1, metadata={"help": "port of the Prometheus page; 0 takes a free one, -1 switches it off"}
    )
    tls_cert: str = field(default="", metadata={"help": "PEM file of the server's certificate chain"})
    tls_key: str = field(default="", metadata={"help": "PEM file of the server's private key"})
    tls_client_ca: str = field(
        default="", metadata={"help": "PEM file of the authority that clients must be signed by (mTLS)"}
    )
    shutdown_grace_s: float = field(
        default=30.0, metadata={"help": "seconds that running calls may take after SIGTERM"}
    )
    reflection: bool = field(default=True, metadata={"help": "answer gRPC reflection (grpcurl)"})

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0..65535, got {self.port}")
        if not -1 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port must be -1..65535, got {self.metrics_port}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.shutdown_grace_s < 0:
            raise ValueError(f"shutdown_grace_s must be >= 0, got {self.shutdown_grace_s}")


class Server:
    """A listening gRPC server.  Health: "" is the process (alive), a service's full name is readiness."""

    def __init__(self, config: ServerConfig, services: Sequence[str]) -> None:
        self.config = config
        self._services = tuple(services)
        self.grpc = grpc.aio.server(
            interceptors=[MetricsInterceptor()],
            options=[
                *SHARED_OPTIONS,
                ("grpc.keepalive_time_ms", 2 * KEEPALIVE_TIME_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                # Otherwise two servers given the same port would share its connections silently.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if config.reflection:
            names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.grpc)
        self.port = 0

    async def start(self) -> int:
        """Listen; services stay NOT_SERVING until `set_serving`.  Returns the port.

        Raises:
            OSError: the address is taken or not ours.
        """
        address = f"{self.config.host}:{self.config.port}"
        try:
            self.port = self._add_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        for service in self._services:
            await self._health.set(service, NOT_SERVING)
        await self.grpc.start()
        if self.config.metrics_port >= 0:
            start_metrics_server(self.config.host, self.config.metrics_port)
        return self.port

    async def set_serving(self, serving: bool = True) -> None:
        for service in self._services:
            await self._health.set(service, SERVING if serving else NOT_SERVING)

    async def stop(self) -> None:
        """Refuse new calls, let running ones finish within the grace period."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(self.config.shutdown_grace_s)

    def _add_port(self, address: str) -> int:
        if not self.config.tls_cert:
            return self.grpc.add_insecure_port(address)
        client_ca = self.config.tls_client_ca
        credentials = grpc.ssl_server_credentials(
            [(Path(self.config.tls_key).read_bytes(), Path(self.config.tls_cert).read_bytes())],
            Path(client_ca).read_bytes() if client_ca else None,
            require_client_auth=bool(client_ca),
        )
        return self.grpc.add_secure_port(address, credentials)


def shutdown_signal() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; call it before telling anybody that the server runs."""
    stop = asyncio.Event()

    def on_signal() -> None:
        log.info("stopping")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop
