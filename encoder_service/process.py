"""The life of the encoder service's process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from encoder_service.config import CPU_SLOTS, GPU_SLOTS, EncoderConfig
from encoder_service.servicer import EncoderServicer
from encoder_service.tile_slots import TileSlots
from encoder_service.vision import VisionEncoder
from protos.checkpoint import open_checkpoint
from protos.encoder_rpc import SERVICE_NAME, add_encoder_servicer
from protos.fingerprint import FingerprintBase
from protos.quantized import payload_bytes
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
    slots = await asyncio.to_thread(_prepare_slots, vision, config)
    is_gpu = device.type == "cuda"
    gpu = await asyncio.to_thread(_prepare_gpu, vision, config, slots) if is_gpu else None
    servicer = EncoderServicer(config, FingerprintBase(checkpoint), vision, gpu, slots=slots)
    server = Server(config.server, [SERVICE_NAME])
    add_encoder_servicer(servicer, server.grpc)
    servicer.watch_load()
    servicer.start()
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
        await server.stop()
        if watching is not None:  # until here: streams of a tower that hangs are not worth the grace
            watching.cancel()
        await servicer.stop()


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


def _prepare_slots(vision: VisionEncoder, config: EncoderConfig) -> TileSlots | None:
    if not config.tile_ring_mib:
        return None
    tile_bytes = payload_bytes(vision.dtype, vision.config.tokens_per_tile, vision.hidden_size)
    most = GPU_SLOTS if vision.device.type == "cuda" else CPU_SLOTS
    return TileSlots.create(config.tile_ring_mib << 20, tile_bytes, most)


def _prepare_gpu(vision: VisionEncoder, config: EncoderConfig, slots: TileSlots | None) -> CudaVision:
    from encoder_service.cuda_vision import CudaVision  # loads Triton

    cache_bytes = config.device_cache_mib << 20
    return CudaVision(vision, config.max_batch_tiles, cache_bytes, config.first_batch_tiles, slots)
