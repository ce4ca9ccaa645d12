"""The life of the encoder service's process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from encoder_service.config import EncoderConfig
from encoder_service.servicer import EncoderServicer
from encoder_service.vision import VisionEncoder
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.ring import sweep
from protos.server import Server, shutdown_signal
from protos.stall import withdraw_while_stalled

if TYPE_CHECKING:
    from encoder_service.cuda_vision import CudaVision

log = logging.getLogger(__name__)


async def serve(config: EncoderConfig, on_ready: Callable[[int], None]) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        CheckpointError, ValueError, OSError: it cannot start as configured.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    checkpoint = await asyncio.to_thread(open_checkpoint, config.model)
    device = _resolve_device(config.device)
    vision = await asyncio.to_thread(VisionEncoder.load, checkpoint, device, config.dtype, config.load_format)
    gpu = await asyncio.to_thread(_prepare_gpu, vision, config) if device.type == "cuda" else None
    servicer = EncoderServicer(config, FingerprintBase(checkpoint), vision, gpu)
    server = Server(config.server, [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.watch_load()
    if config.tile_ring_dir:
        await asyncio.to_thread(sweep, Path(config.tile_ring_dir))
    port = await server.start()
    shutdown = shutdown_signal()
    watching: asyncio.Task[None] | None = None
    try:
        await server.set_serving()
        watching = asyncio.create_task(watch_tower(config.forward_timeout_s, servicer, server))
        log.info("encoder ready: %s on %s", vision.dtype, vision.device)
        on_ready(port)
        await shutdown.wait()
    finally:
        servicer.drain()
        await server.stop()
        if watching is not None:  # until here: streams of a tower that hangs are not worth the grace
            watching.cancel()
        servicer.close()


async def watch_tower(limit_s: float, servicer: EncoderServicer, server: Server) -> None:
    """Take the service out of use while its tower hangs; until cancelled."""
    await withdraw_while_stalled(
        server,
        "tower",
        limit_s,
        lambda: servicer.is_computing,
        lambda: servicer.forwards_done,
        servicer.set_stalled,
    )


def _resolve_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _prepare_gpu(vision: VisionEncoder, config: EncoderConfig) -> CudaVision:
    from encoder_service.cuda_vision import CudaVision  # loads Triton

    return CudaVision(vision, config.max_batch_tiles, config.device_cache_mib << 20, config.first_batch_tiles)
