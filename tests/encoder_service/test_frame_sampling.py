"""Sampled frames are those of InternVL's own code."""

from __future__ import annotations

import random

import numpy as np
import pytest

from encoder_service.frame_sampling import sample_frames
from protos.media import FrameSampling


def reference(start_s: float, end_s: float, fps: float, max_frame: int, num_segments: int) -> list[int]:
    """`get_index` of InternVL's model cards, word for word but for the names."""
    start = max(0, round(start_s * fps))
    end = min(round(end_s * fps), max_frame)
    seg_size = float(end - start) / num_segments
    return [int(start + (seg_size / 2) + np.round(seg_size * idx)) for idx in range(num_segments)]


def test_2000_random_videos_give_the_references_frames() -> None:
    source = random.Random(3)
    for _ in range(2000):
        num_stored, fps = source.randint(2, 5000), source.choice([8, 12.5, 23.976, 25, 30000 / 1001, 60])
        last_s = num_stored / fps
        start_s = source.choice([0.0, source.uniform(0, 0.4 * last_s)])
        end_s = source.choice([100_000.0, source.uniform(0.6 * last_s, 2 * last_s)])
        room = min(round(end_s * fps), num_stored - 1) - round(start_s * fps) + 1
        num_frames = source.randint(1, min(room, 64))
        sampling = FrameSampling(num_frames, start_s=start_s, end_s=end_s)
        expected = reference(start_s, end_s, fps, num_stored - 1, num_frames)
        assert sample_frames(num_stored, fps, sampling) == expected


@pytest.mark.parametrize(
    ("num_stored", "sampling", "count"),
    [
        (1, FrameSampling(8), 1),
        (3, FrameSampling(8), 3),
        (100, FrameSampling(8), 8),
        (100, FrameSampling(128, fps=2), 20),  # 10 s
        (100, FrameSampling(5, fps=2), 5),
        (100, FrameSampling(128, fps=0.01), 1),
        (100, FrameSampling(128, fps=1000), 100),
        (100, FrameSampling(128, fps=1, start_s=4, end_s=7), 3),
    ],
)
def test_no_more_frames_than_there_are_and_as_many_as_the_rate_says(
    num_stored: int, sampling: FrameSampling, count: int
) -> None:
    frames = sample_frames(num_stored, 10, sampling)
    assert len(frames) == count
    assert frames == sorted(frames) and 0 <= frames[0] and frames[-1] < num_stored


def test_bounds_hold_the_frames() -> None:
    frames = sample_frames(100, 10, FrameSampling(8, start_s=2, end_s=4))
    assert 20 <= frames[0] and frames[-1] <= 40


def test_a_start_behind_the_end_is_named() -> None:
    with pytest.raises(ValueError, match=r"start_s is 12, but the video ends at 9.9 s"):
        sample_frames(100, 10, FrameSampling(8, start_s=12))
