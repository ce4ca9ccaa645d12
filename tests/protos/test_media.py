"""What a sampling of frames may be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from protos.media import DEFAULT_NUM_FRAMES, FrameSampling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"fps": -1.0}, "fps must be a finite number above 0"),
        ({"fps": math.nan}, "fps must be a finite number above 0"),
        ({"fps": math.inf}, "fps must be a finite number above 0"),
        ({"start_s": -0.1}, "start_s must be a finite number of seconds from 0"),
        ({"start_s": math.nan}, "start_s must be a finite number of seconds from 0"),
        ({"start_s": 2.0, "end_s": 2.0}, "end_s must be behind start_s"),
        ({"end_s": math.nan}, "end_s must be behind start_s"),
    ],
)
def test_impossible_samplings_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        FrameSampling(**fields)


def test_nothing_said_is_the_whole_video() -> None:
    sampling = FrameSampling()
    assert (sampling.num_frames, sampling.start_s, sampling.end_s) == (DEFAULT_NUM_FRAMES, 0, math.inf)
