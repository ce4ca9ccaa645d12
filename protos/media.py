"""What a medium can be and which frames of a video count: inputs of the content hash."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

# As many as InternVL's own examples take.
DEFAULT_NUM_FRAMES = 8


class MediaKind(Enum):
    IMAGE = "image"
    VIDEO = "video"
    DOCUMENT = "document"


@dataclass(frozen=True)
class FrameSampling:
    """Evenly spread frames between two times; nothing is left to defaults."""

    num_frames: int = DEFAULT_NUM_FRAMES  # with `fps` the most
    fps: float = 0.0  # of these in each second; 0: `num_frames` says how many
    start_s: float = 0.0
    end_s: float = math.inf

    def __post_init__(self) -> None:
        """Raises ValueError: the name of the wrong field, a space, and what it must be."""
        if self.num_frames < 1:
            raise ValueError("num_frames must be at least 1")
        if not 0 <= self.fps < math.inf:
            raise ValueError("fps must be a finite number above 0")
        if not 0 <= self.start_s < math.inf:
            raise ValueError("start_s must be a finite number of seconds from 0")
        if not self.end_s > self.start_s:
            raise ValueError("end_s must be behind start_s")
