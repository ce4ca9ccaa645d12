"""The one way to open a channel: message limits, keepalive, fast reconnection, TLS."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.options import KEEPALIVE_TIME_MS, SHARED_OPTIONS

# A restarted peer is found again within this time instead of gRPC's default of up to two minutes.
MAX_RECONNECT_BACKOFF_MS = 1000
CONNECT_TIMEOUT_MS = 5000


@dataclass(frozen=True)
class ClientTlsConfig:
    """Certificates of an outgoing connection; all empty means plaintext."""

    ca: str = field(default="", metadata={"help": "PEM file of the authority that signed the server"})
    cert: str = field(default="", metadata={"help": "PEM file of this client's certificate (mTLS)"})
    key: str = field(default="", metadata={"help": "PEM file of this client's private key (mTLS)"})

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ValueError("client TLS needs both cert and key, or neither")
        if self.cert and not self.ca:
            raise ValueError("client TLS needs ca when cert is given")


def open_channel(target: str, tls: ClientTlsConfig | None = None, server_name: str = "") -> grpc.aio.Channel:
    """A channel to `host:port` or `dns:///name:port`, balanced round-robin over what the name resolves to.

    Every caller gets its own connection: token streams must not queue behind tensors.  `server_name` is
    what the server's certificate must say where the target is an address that the name resolved to.
    """
    options = [
        *SHARED_OPTIONS,
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name the time that one attempt may take, TLS handshake included.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    if tls is None or not tls.ca:
        return grpc.aio.insecure_channel(target, options=options)
    credentials = grpc.ssl_channel_credentials(
        Path(tls.ca).read_bytes(),
        Path(tls.key).read_bytes() if tls.key else None,
        Path(tls.cert).read_bytes() if tls.cert else None,
    )
    return grpc.aio.secure_channel(target, credentials, options=options)


async def is_serving(channel: grpc.aio.Channel, service: str, timeout_s: float) -> bool:
    """What the server says about its health; a server without the health service counts as healthy.

    Raises:
        grpc.RpcError: it does not say.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return True
        raise
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
