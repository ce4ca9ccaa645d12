"""What the encoder's stages take on this GPU: `python -m encoder_service.timing`.

CUDA only; random weights of the real shapes, made on the device.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from encoder_service.cuda_vision import CudaVision
from encoder_service.media import ImageLimits, decode_image
from encoder_service.model.config import VisionConfig
from encoder_service.model.fused_vision import FusedVision
from encoder_service.tiling import TilePlan, TilingOptions, plan_tiles
from encoder_service.vision import VisionEncoder, VisionModel, normalized_values
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

# A large bf16 matrix product of random numbers on an H200.
PEAK_TFLOPS = 790
BATCHES = (1, 7, 10, 16, 26, 28, 32)
PICTURES = ((1024, 1024), (1344, 896))
REPEATS = 20

INTERNVIT_300M = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_stored_layers=24,
    num_heads=16,
    patch_size=14,
    image_size=448,
    norm_type="layer_norm",
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    qk_norm_eps=1e-6,
    output_size=3584,
    ps_version="v2",
    downsample_ratio=0.5,
)
TOWERS = {
    "InternViT-300M": INTERNVIT_300M,
    "InternViT-6B": replace(
        INTERNVIT_300M,
        hidden_size=3200,
        intermediate_size=12_800,
        num_layers=45,
        num_stored_layers=45,
        num_heads=25,
        norm_type="rms_norm",
        qkv_bias=False,
        qk_norm=True,
        output_size=8192,
    ),
}


@dataclass(frozen=True)
class Stages:
    """Medians, milliseconds."""

    decode_ms: float
    enqueue_ms: float  # the host's part of making tiles: into page-locked memory, and the launches
    resize_ms: float  # the GPU's part
    tower_ms: float
    transfer_ms: float
    total_ms: float  # from the file's bytes to embeddings on the host


def make_encoder(config: VisionConfig, device: torch.device, weight_scale: float = 0.02) -> VisionEncoder:
    """Normally distributed bf16 weights of `weight_scale`, norms and LayerScale around 1 and 0.1."""
    with torch.device("meta"):
        model = VisionModel(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, weight_scale, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
            elif name.endswith("gamma"):
                parameter.add_(0.1)
    preprocessing = Preprocessing(
        image_size=config.image_size,
        patch_size=config.patch_size,
        downsample_ratio=config.downsample_ratio,
        ps_version=config.ps_version,
        min_tiles=1,
        max_tiles=12,
        use_thumbnail=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return VisionEncoder(model, config, preprocessing)


def tile_tflop(config: VisionConfig) -> float:
    """Of one tile: two operations a multiply-add, matrix products and attention only."""
    num_patches, size = config.grid_size**2, config.hidden_size
    length = num_patches + 1
    layer = length * size * (4 * size + 2 * config.intermediate_size) + 2 * length**2 * size
    projector = (
        config.tokens_per_tile * config.output_size * (config.projector_input_size + config.output_size)
    )
    patches = num_patches * 3 * config.patch_size**2 * size
    return 2 * (config.num_layers * layer + projector + patches) * 1e-12


def tower_ms(vision: CudaVision, num_tiles: int) -> float:
    """Median of the forwards' own times."""
    tiles = list(_random_tiles(num_tiles).to(vision.device))
    torch.cuda.synchronize()
    for _ in range(3):
        vision.launch(tiles).result()
    return statistics.median(vision.launch(tiles).result().encode_ns * 1e-6 for _ in range(REPEATS))


def picture_stages(vision: CudaVision, width: int, height: int) -> Stages:
    data = _jpeg(width, height)
    options = TilingOptions(1, 12, True)
    plan = plan_tiles(width, height, options, vision.preprocessing.image_size)
    for _ in range(3):
        _encode_once(vision, data, plan)
    resize_ms = _resize_ms(vision, width, height, plan)
    samples = [_encode_once(vision, data, plan, resize_ms) for _ in range(REPEATS)]
    fields = Stages.__dataclass_fields__
    return Stages(**{name: statistics.median(getattr(sample, name) for sample in samples) for name in fields})


def _resize_ms(vision: CudaVision, width: int, height: int, plan: TilePlan) -> float:
    """Captured, so that it is the GPU's time and not that of launching."""
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=vision.device)
    vision.tiler.resize(pixels, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vision.tiler.resize(pixels, plan)
    return _event_ms(graph.replay, REPEATS)


def _encode_once(vision: CudaVision, data: bytes, plan: TilePlan, resize_ms: float = 0.0) -> Stages:
    start = time.perf_counter()
    image = decode_image(data, ImageLimits(), "data")
    decoded = time.perf_counter()
    tiles = list(vision.make_tiles(image, plan).cut(range(plan.num_tiles)))
    enqueued = time.perf_counter()
    result = vision.launch(tiles).result()
    done = time.perf_counter()
    return Stages(
        decode_ms=(decoded - start) * 1e3,
        enqueue_ms=(enqueued - decoded) * 1e3,
        resize_ms=resize_ms,
        tower_ms=result.encode_ns * 1e-6,
        transfer_ms=result.transfer_ns * 1e-6,
        total_ms=(done - start) * 1e3,
    )


def print_tower(name: str, config: VisionConfig, shows_profile: bool) -> CudaVision:
    encoder = make_encoder(config, torch.device("cuda"))
    start = time.perf_counter()
    vision = CudaVision(encoder, max(BATCHES), first_batch_tiles=max(BATCHES))
    tflop = tile_tflop(config)
    print(f"\n{name}: {tflop:.2f} TFLOP a tile, ready after {time.perf_counter() - start:.1f} s")
    print(f"{'tiles':>6} {'ms':>8} {'TFLOP/s':>8} {'of peak':>8} {'ms eager':>9}")
    for num_tiles in BATCHES:
        milliseconds = tower_ms(vision, num_tiles)
        rate = tflop * num_tiles / milliseconds * 1e3
        eager = _eager_ms(encoder, num_tiles)
        print(
            f"{num_tiles:6} {milliseconds:8.2f} {rate:8.0f} {rate / PEAK_TFLOPS:8.1%} {eager:9.2f}",
            flush=True,
        )
    if shows_profile:
        _print_profile(encoder, 10)
    return vision


def print_pictures(vision: CudaVision) -> None:
    columns = ("picture", "decode", "enqueue", "resize", "tower", "transfer", "total")
    print("\n" + " ".join(f"{column:>9}" for column in columns) + "  ms")
    for width, height in PICTURES:
        stages = picture_stages(vision, width, height)
        times = (getattr(stages, name) for name in stages.__dataclass_fields__)
        print(
            f"{f'{width}x{height}':>9} " + " ".join(f"{milliseconds:9.2f}" for milliseconds in times),
            flush=True,
        )


def _eager_ms(encoder: VisionEncoder, num_tiles: int) -> float:
    """The modules' own forward, for comparison."""
    side = encoder.config.image_size
    pixels = torch.randn((num_tiles, 3, side, side), dtype=encoder.dtype, device=encoder.device)
    with torch.inference_mode():
        return _event_ms(partial(encoder.model, pixels))


def _event_ms(call: Callable[[], object], repeats: int = 5) -> float:
    times: list[float] = []
    for _ in range(repeats + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times[2:])


def _print_profile(encoder: VisionEncoder, num_tiles: int) -> None:
    """Which kernels one fused forward consists of; not captured, so gaps are not those of a graph."""
    config = encoder.config
    fused = FusedVision(encoder.model.tower, encoder.model.projector, config, normalized_values(encoder))
    tiles = _random_tiles(num_tiles).to(encoder.device)
    output = torch.empty(
        (num_tiles, config.tokens_per_tile, config.output_size), dtype=encoder.dtype, device=encoder.device
    )
    fused.forward(tiles, output)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        fused.forward(tiles, output)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if str(event.device_type) == "DeviceType.CUDA"]
    print(f"kernels of one forward of {num_tiles} tiles:")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:14]:
        total_us, count = kernel.self_device_time_total, kernel.count
        print(f"{total_us / 1e3:8.2f} ms {count:4} x {total_us / count:8.1f} us  {kernel.key[:110]}")


def _random_tiles(num_tiles: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return torch.randint(0, 256, (num_tiles, 3, 448, 448), dtype=torch.uint8, generator=generator)


def _jpeg(width: int, height: int) -> bytes:
    """Smooth noise: about the bytes of a photograph."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--towers", default=",".join(TOWERS), help="names or parts of names, by comma")
    parser.add_argument("--profile", action="store_true", help="the kernels of a forward of 10 tiles, too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    wanted = arguments.towers.split(",")
    for name, config in TOWERS.items():
        if any(part in name for part in wanted):
            vision = print_tower(name, config, arguments.profile)
            print_pictures(vision)


if __name__ == "__main__":
    main()
