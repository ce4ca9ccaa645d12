"""Bodies follow from the seed alone, in the order in which the peers' generator draws."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.bench.workload import WORKLOADS, Workload, request_bodies

SMALL = Workload(2, 64, 48, 20, 100, 192)


def content(body: bytes) -> list[dict[str, Any]]:
    (message,) = json.loads(body)["messages"]
    parts: list[dict[str, Any]] = message["content"]
    return parts


def expected_parts(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Words first, then each picture's noise: a JPEG of quality 90, blown up from cells of 16 pixels."""
    words = rng.choice(["red", "panda", "on", "a", "tree", "looks", "down"], 20)
    parts = []
    for _ in range(2):
        noise = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": " ".join(words)}]


def test_bodies_are_those_of_the_seed() -> None:
    rng = np.random.default_rng(7)
    bodies = request_bodies(SMALL, "m", 7, 3)
    assert [content(body) for body in bodies] == [expected_parts(rng) for _ in range(3)]
    assert bodies == request_bodies(SMALL, "m", 7, 3) != request_bodies(SMALL, "m", 8, 3)


def test_no_two_requests_share_a_picture_unless_told() -> None:
    urls = [
        part["image_url"]["url"] for body in request_bodies(SMALL, "m", 1, 4) for part in content(body)[:2]
    ]
    assert len(set(urls)) == 8
    shared = [content(body)[:2] for body in request_bodies(SMALL, "m", 1, 4, same_image=True)]
    assert shared == [shared[0]] * 4


def test_text_alone_has_one_part() -> None:
    (body,) = request_bodies(WORKLOADS["text"], "m", 1, 1)
    (part,) = content(body)
    assert part["type"] == "text" and len(part["text"].split()) == 30


@pytest.mark.parametrize(("level", "requests"), [(1, 32), (2, 64), (8, 192), (64, 192)])
def test_few_streams_get_fewer_requests(level: int, requests: int) -> None:
    assert WORKLOADS["1img"].requests_at(level) == requests
