"""Tiles of a picture, made on the GPU and equal to Pillow's bit for bit; the pixels cross the bus once.

Imported only where there is a GPU.  Knows nothing about file formats or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image

from encoder_service.resample_kernels import resample_into_tiles
from encoder_service.resampling import bicubic_weights, height_goes_first
from encoder_service.tiling import TileCutter, TilePlan

# Pictures of more bytes are copied from pageable memory: page-locked blocks are kept for ever.
_MOST_PINNED_BYTES = 16 << 20
# Pairs of (source, target) size whose weights stay on the GPU; at most about 1 MiB each.
_WEIGHTS_KEPT = 64
# Square, tall and wide: versions of Pillow differ in the order of the passes.
_PROBES = (TilePlan(2, 2, True), TilePlan(1, 4, True), TilePlan(4, 1, True))


class GpuTiles:
    """All tiles of one picture on the GPU."""

    def __init__(self, tiles: torch.Tensor) -> None:
        self._tiles = tiles  # uint8 [num_tiles, 3, side, side]

    def cut(self, tiles: Sequence[int]) -> list[torch.Tensor]:
        """The tiles of these indices, in this order: views, uint8 [3, side, side] each."""
        return [self._tiles[tile] for tile in tiles]


class GpuTiler:
    """Uploads and resizes on a stream of its own: another stream that uses the tiles must wait for it.

    May be called from several threads.
    """

    def __init__(self, device: torch.device, image_size: int) -> None:
        # Ahead of the tower, whose kernels are many and long: a picture takes a fraction of a millisecond.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._device = device
        self._image_size = image_size
        self._weights = lru_cache(maxsize=_WEIGHTS_KEPT)(self._upload_weights)

    @torch.inference_mode()
    def make(self, image: Image.Image, plan: TilePlan) -> GpuTiles:
        """Enqueue the upload of an RGB picture and the resizing of all its tiles; does not wait for them."""
        assert image.mode == "RGB", image.mode  # Pillow resizes palettes and alpha differently
        with torch.cuda.stream(self.stream):
            return GpuTiles(self.resize(self._upload(np.asarray(image)), plan))

    def resize(self, pixels: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        """uint8 [height, width, 3] on the device -> [num_tiles, 3, side, side], on the current stream"""
        tiles = self._empty(plan.num_tiles, self._image_size, self._image_size)
        num_grid_tiles = plan.columns * plan.rows
        source = pixels.permute(2, 0, 1)
        self._resize(source, tiles[:num_grid_tiles], plan.columns)
        if plan.has_thumbnail:
            self._resize(source, tiles[num_grid_tiles:], 1)
        return tiles

    def equals_pillow(self) -> bool:
        """Whether the Pillow that is installed makes these tiles, too; waits for the device."""
        noise = np.random.default_rng(0)
        return all(self._equals_pillow(noise, plan) for plan in _PROBES)

    def _equals_pillow(self, noise: np.random.Generator, plan: TilePlan) -> bool:
        """For a picture that is shrunk to the plan's canvas."""
        side, tiles = self._image_size, range(plan.num_tiles)
        shape = (plan.rows * side * 4 // 3, plan.columns * side * 5 // 4, 3)
        image = Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))
        made = self.make(image, plan).cut(tiles)
        if self.stream is not None:
            self.stream.synchronize()
        return torch.equal(torch.stack(made).cpu(), TileCutter(image, plan, side).cut(tiles))

    def _resize(self, source: torch.Tensor, tiles: torch.Tensor, columns: int) -> None:
        """Source is [3, height, width].  A pass that keeps the size changes nothing, so none is left out."""
        _, height, width = source.shape
        target_width = columns * self._image_size
        target_height = len(tiles) // columns * self._image_size
        wide, high = self._weights(width, target_width), self._weights(height, target_height)
        if height_goes_first((width, height), (target_width, target_height), PIL.__version__):
            between = self._empty(1, target_height, width)
            resample_into_tiles(source, *high, False, between, 1)
            resample_into_tiles(between[0], *wide, True, tiles, columns)
        else:
            between = self._empty(1, height, target_width)
            resample_into_tiles(source, *wide, True, between, 1)
            resample_into_tiles(between[0], *high, False, tiles, columns)

    def _empty(self, num_tiles: int, height: int, width: int) -> torch.Tensor:
        return torch.empty((num_tiles, 3, height, width), dtype=torch.uint8, device=self._device)

    def _upload_weights(self, source_size: int, target_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First source pixels [target_size] and weights [num_taps, target_size]."""
        weights = bicubic_weights(source_size, target_size)
        packed = self._upload(np.concatenate((weights.first[None], weights.weights)))
        return packed[0], packed[1:]

    def _upload(self, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8 | np.int32]]) -> torch.Tensor:
        host = torch.empty(
            array.shape,
            dtype=torch.uint8 if array.dtype == np.uint8 else torch.int32,
            pin_memory=self._device.type == "cuda" and array.nbytes <= _MOST_PINNED_BYTES,
        )
        np.copyto(host.numpy(), array)  # torch's copy would wake its pool
        return host.to(self._device, non_blocking=True)
