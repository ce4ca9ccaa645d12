"""What the encoder and its decoder processes say to each other: one packet of JSON a job, one an answer.

Bytes of files and pixels travel in shared memory beside the packets.  Imports nothing heavy: it is all that
a decoder process shares with the encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from encoder_service.container_limits import MAX_PARTS, ContainerLimits
from protos.media import FrameSampling

# Below what Linux takes as one packet of a unix socket (212,992 bytes unless configured otherwise).
MAX_PACKET_BYTES = 160 << 10
READY = b"ready"
MAX_ASPECT_RATIO = 200


class Undecodable(Exception):
    """The file is at fault.  The message is ours and may reach a client."""


@dataclass(frozen=True)
class StoredPart:
    """A frame or a page: its size in pixels once decoded, and where its file holds it."""

    width: int
    height: int
    timestamp_s: float  # of a frame
    place: tuple[int, ...]  # means something to the decoder process only

    @property
    def num_bytes(self) -> int:
        """As RGB."""
        return self.width * self.height * 3


@dataclass(frozen=True)
class Job:
    """Read headers where there are no `parts`, of a video for `sampling`; else decode those parts."""

    format: str  # "mov", "matroska" or "pdf"
    limits: ContainerLimits
    sampling: FrameSampling
    parts: tuple[StoredPart, ...]
    cpu_s: float  # that the job may take

    def to_packet(self) -> bytes:
        parts = _lists(self.parts)
        return json.dumps(asdict(self) | {"parts": parts}, separators=(",", ":")).encode()

    @classmethod
    def from_packet(cls, packet: bytes) -> Job:
        fields = json.loads(packet)
        return cls(
            fields["format"],
            ContainerLimits(**fields["limits"]),
            FrameSampling(**fields["sampling"]),
            _parts(fields["parts"]),
            fields["cpu_s"],
        )


@dataclass(frozen=True)
class Answer:
    """The parts that the headers speak of, or those that were decoded; or what is wrong with the file."""

    parts: tuple[StoredPart, ...] = ()
    problem: str = ""
    detail: str = ""  # for the log

    def to_packet(self) -> bytes:
        fields = {"parts": _lists(self.parts), "problem": self.problem, "detail": self.detail[:1000]}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_packet(cls, packet: bytes) -> Answer:
        """Raises ValueError for what is no answer: the process may have been taken over by its file."""
        try:
            fields = json.loads(packet)
            return cls(_parts(fields["parts"]), str(fields["problem"]), str(fields["detail"]))
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError("not an answer") from error


def _lists(parts: Sequence[StoredPart]) -> list[Any]:
    return [[part.width, part.height, part.timestamp_s, *part.place] for part in parts]


def _parts(lists: Any) -> tuple[StoredPart, ...]:
    parts = tuple(
        StoredPart(int(width), int(height), float(timestamp_s), tuple(map(int, place)))
        for width, height, timestamp_s, *place in lists
    )
    if not all(map(_is_possible, parts)) or len(parts) > MAX_PARTS:
        raise ValueError("impossible parts")
    return parts


def _is_possible(part: StoredPart) -> bool:
    return part.width > 0 and part.height > 0 and math.isfinite(part.timestamp_s)


def check_size(what: str, width: int, height: int, limits: ContainerLimits) -> None:
    """Raises Undecodable for a frame or page of more pixels than are allowed, or none."""
    size = f"{what} is {width} x {height} pixels"
    if width < 1 or height < 1:
        raise Undecodable(f"{size}: an empty picture")
    if width * height > limits.max_part_pixels:
        raise Undecodable(f"{size}: at most {limits.max_part_pixels} pixels are decoded")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Undecodable(f"{size}: the longer side may be at most {MAX_ASPECT_RATIO} times the shorter one")
