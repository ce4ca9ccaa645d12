"""Micro-batches for the trainer: fresh ones as fast as the workers make them, and earlier ones in between.

Measured on an H200 with 16 CPU cores: 15 workers make about 4,000 tiles a second and the GPU takes
8,000. Rather than wait it trains again on what lies in its memory, under other noise.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Iterator

import torch

from deploy.demo_training.batches import Batch

AHEAD = 4  # fresh micro-batches that may wait


class Feed:
    """Hands out every fresh micro-batch once and keeps the last `capacity`; with none it only waits."""

    def __init__(self, batches: Iterator[Batch], device: torch.device, capacity: int, seed: int) -> None:
        self._device = device
        self._kept: deque[Batch] = deque(maxlen=capacity)
        self._fresh: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._random = random.Random(seed)
        self.num_fresh = 0
        threading.Thread(target=self._pull, args=(batches,), daemon=True).start()

    def take(self) -> Batch:
        """The next micro-batch, on the device; raises what making one raised."""
        try:
            # Repeating the first few over and over would teach them by heart.
            fresh = self._fresh.get(block=2 * len(self._kept) <= (self._kept.maxlen or 0))
        except queue.Empty:
            return self._random.choice(self._kept)
        if isinstance(fresh, BaseException):
            raise fresh
        batch = fresh.to(self._device)
        self._kept.append(batch)
        self.num_fresh += 1
        return batch

    def _pull(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                self._fresh.put(batch)
            raise RuntimeError("the micro-batches have come to an end")
        except BaseException as error:  # a worker that died must not leave the trainer waiting
            self._fresh.put(error)
