"""What the load generator asks: workloads by name, and the request bodies of one level.

Bodies are byte for byte those of the generator that the peers were measured with, for the same seed.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

WORDS = ("red", "panda", "on", "a", "tree", "looks", "down")
NOISE_CELL = 16  # pixels of the noise that is blown up to a picture
JPEG_QUALITY = 90
# Below this many streams a level has at most so many requests a stream.
FEW_STREAMS = 8
REQUESTS_PER_STREAM = 32

Noise = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Workload:
    """One kind of request, and how often it is asked."""

    num_images: int
    width: int  # pixels
    height: int  # pixels
    prompt_words: int
    max_tokens: int
    num_requests: int
    levels: tuple[int, ...] = (1,)  # concurrent streams
    prompt_tokens: float = 0.0  # the peers' mean, with visual tokens; 0: not known

    def requests_at(self, concurrency: int) -> int:
        if concurrency < FEW_STREAMS:
            return min(self.num_requests, concurrency * REQUESTS_PER_STREAM)
        return self.num_requests


# As in docs/benchmarks/peers_h200.json ("commands", "prompt_tokens").
WORKLOADS = {
    "text": Workload(0, 0, 0, 30, 256, 512, (1, 64, 256), 151),
    "1img": Workload(1, 1024, 1024, 20, 100, 192, (1, 16, 64), 2669),
    "4img": Workload(4, 1344, 896, 20, 32, 48, (1, 16), 7286),
}


def request_bodies(
    workload: Workload, model: str, seed: int, count: int, same_image: bool = False
) -> list[bytes]:
    """`count` JSON bodies; the pictures of each are its own unless all share one set.

    Pictures are compressed in threads; what is random is drawn in a fixed order.
    """
    rng = np.random.default_rng(seed)

    def draw_pictures() -> list[Noise]:
        return [draw_noise(rng, workload.width, workload.height) for _ in range(workload.num_images)]

    shared = draw_pictures() if same_image else None
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        pending: list[Callable[[], bytes]] = []
        for _ in range(count):
            text = " ".join(rng.choice(WORDS, workload.prompt_words))
            pictures = draw_pictures() if shared is None else shared
            pending.append(threads.submit(_body, workload, model, text, pictures).result)
        return [result() for result in pending]


def draw_noise(rng: np.random.Generator, width: int, height: int) -> Noise:
    """For `noise_jpeg` of that size."""
    rows, columns = height // NOISE_CELL + 1, width // NOISE_CELL + 1
    return rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def _body(workload: Workload, model: str, text: str, pictures: Sequence[Noise]) -> bytes:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_uri(noise, workload)}} for noise in pictures
    ]
    content.append({"type": "text", "text": text})
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "max_tokens": workload.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def _data_uri(noise: Noise, workload: Workload) -> str:
    data = noise_jpeg(noise, workload.width, workload.height)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def noise_jpeg(noise: Noise, width: int, height: int) -> bytes:
    """Low-frequency noise: decodes and resizes like a photograph of that size."""
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
