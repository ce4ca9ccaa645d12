"""Videos to frames, by FFmpeg.  Runs in a decoder process only: hostile files may end it.

Knows nothing about tiles and the model.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import StoredPart, Undecodable, check_size
from encoder_service.frame_sampling import sample_frames
from protos.media import FrameSampling

CORRUPT = "the video is truncated, corrupt or of an unsupported kind"
# Names of FFmpeg's decoders.  It has hundreds, and most of its security fixes are in those nobody uses.
CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4")
CODEC_NAMES = "H.264, H.265, VP8, VP9, AV1 and MPEG-4"
# Above what any camera has; a wrong rate only makes the times of frames wrong.
_MAX_FPS = 1000
_BOX_HEADER_BYTES = 8
_MAX_BOXES = 1000  # looked at on each level
# (a, b, c, d) of a track's matrix, as signs, to clockwise quarter turns.  ISO/IEC 14496-12, 8.3.2.
_QUARTER_TURNS = {(0, 1, -1, 0): 1, (-1, 0, 0, -1): 2, (0, -1, 1, 0): 3}

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

av.logging.set_level(av.logging.PANIC)  # a file must not fill the log


@dataclass(frozen=True)
class _Index:
    """Of all stored frames in the order in which they are shown."""

    times: list[int]  # in units of the stream
    key_times: list[int]  # of those that need no other to be decoded, ascending


def open_video(
    file: BinaryIO, format: str, sampling: FrameSampling, limits: ContainerLimits
) -> list[StoredPart]:
    """The sampled frames; no pixel is decoded.

    Raises:
        Undecodable: corrupt, without a video stream, or beyond a limit.
    """
    with _opened(file, format) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        check_size("each frame", width, height, limits)
        index = _read_index(container, stream, limits)
        fps = _frames_per_second(stream, index)
        unit_s = float(stream.time_base or 0)
    turns = _quarter_turns(file) if format == "mov" else 0
    if turns % 2:
        width, height = height, width
    try:
        chosen = [index.times[number] for number in sample_frames(len(index.times), fps, sampling)]
    except ValueError as error:
        raise Undecodable(str(error)) from error
    return [
        StoredPart(width, height, (time - index.times[0]) * unit_s, (time, _key_time(index, time), turns))
        for time in chosen
    ]


def read_frames(
    file: BinaryIO, format: str, parts: Sequence[StoredPart], limits: ContainerLimits
) -> Iterator[Pixels]:
    """[height, width, 3] of each part, upright; parts must be in the order of their times.

    Raises:
        Undecodable: the frames are corrupt.
    """
    with _opened(file, format) as (container, stream):
        stream.codec_context.thread_count = 1  # bounds memory; other videos take the other cores
        cursor = _Cursor(container, stream)
        for part in parts:
            time, key_time, turns = part.place
            frame = cursor.frame_at(time, key_time)
            check_size("a frame", frame.width, frame.height, limits)
            width, height = (part.height, part.width) if turns % 2 else (part.width, part.height)
            rgb = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
            yield np.rot90(rgb, -turns)


class _Cursor:
    """Walks forward through the frames, from the key frame before the wanted one if that is nearer."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container = container
        self._stream = stream
        self._frames: Iterator[VideoFrame] = iter(())
        self._last: VideoFrame | None = None

    def frame_at(self, time: int, key_time: int) -> VideoFrame:
        """The frame of that time; the next one where that is never shown, or the last of all."""
        if self._last is None or _time(self._last) < key_time:
            self._seek(key_time)
            if self._last is not None and _time(self._last) > time:  # the container's index misled us
                self._container.seek(0, stream=self._stream)
                self._restart()
        while self._last is not None and _time(self._last) < time:
            following = next(self._frames, None)
            if following is None:
                return self._last
            self._last = following
        if self._last is None:
            raise Undecodable(CORRUPT)
        return self._last

    def _seek(self, time: int) -> None:
        self._container.seek(time, stream=self._stream)
        self._restart()

    def _restart(self) -> None:
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._last = next(self._frames, None)


def _time(frame: VideoFrame) -> int:
    assert frame.pts is not None
    return frame.pts


@contextmanager
def _opened(file: BinaryIO, format: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """FFmpeg's errors are the file's fault; their text stays here."""
    file.seek(0)
    options = {"codec_whitelist": ",".join(CODECS)}
    try:
        with av.open(
            file, format=format, options=options, metadata_errors="ignore", io_open=_open_nothing
        ) as container:
            assert isinstance(container, InputContainer)
            stream = _video_stream(container)
            if stream.codec_context is None or stream.codec_context.name not in CODECS:
                raise Undecodable(f"the video's codec is not supported; supported are {CODEC_NAMES}")
            yield container, stream
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise Undecodable(CORRUPT) from error


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> Any:
    """A container may name other files; none is read."""
    raise Undecodable("the video refers to other files")


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of an album
            return stream
    raise Undecodable("the file has no video stream")


def _read_index(container: InputContainer, stream: VideoStream, limits: ContainerLimits) -> _Index:
    """From the packets themselves: what headers say of lengths is neither complete nor to be trusted."""
    times: list[int] = []
    key_times: list[int] = []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.pts is None:
            raise Undecodable(CORRUPT)
        times.append(packet.pts)
        if packet.is_keyframe:
            key_times.append(packet.pts)
        if len(times) > limits.max_stored_frames:
            raise Undecodable(f"the video has more than {limits.max_stored_frames} frames")
    if not times or len(times) < _promised_frames(container, stream):
        raise Undecodable(CORRUPT if times or stream.frames else "the video has no frames")
    return _Index(sorted(times), sorted(key_times))


def _promised_frames(container: InputContainer, stream: VideoStream) -> int:
    """How many frames an MP4's table of samples places within the file; truncated ones have fewer."""
    size = container.size
    entries = stream.index_entries
    beyond = any(entry.pos + entry.size > size for entry in entries) if size > 0 else False
    return len(entries) + 1 if beyond else 0


def _frames_per_second(stream: VideoStream, index: _Index) -> float:
    """Only a sampling by time depends on it."""
    stated = float(stream.average_rate or 0)
    if 0 < stated <= _MAX_FPS:
        return stated
    span_s = (index.times[-1] - index.times[0]) * float(stream.time_base or 0)
    return min((len(index.times) - 1) / span_s, _MAX_FPS) if span_s > 0 else 1.0


def _key_time(index: _Index, time: int) -> int:
    """Of the key frame from which `time` can be reached."""
    position = bisect_right(index.key_times, time)
    return index.key_times[position - 1] if position else index.times[0]


def _quarter_turns(file: BinaryIO) -> int:
    """Clockwise turns that make the first video track of an MP4 upright, from its header; else 0."""
    size = file.seek(0, io.SEEK_END)
    for moov in _boxes(file, b"moov", 0, size):
        for track in _boxes(file, b"trak", *moov):
            if _is_video(file, track):
                return next((_turns_of(file, *header) for header in _boxes(file, b"tkhd", *track)), 0)
    return 0


def _is_video(file: BinaryIO, track: tuple[int, int]) -> bool:
    for media in _boxes(file, b"mdia", *track):
        for start, _ in _boxes(file, b"hdlr", *media):
            file.seek(start + 8)
            return file.read(4) == b"vide"
    return False


def _turns_of(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    header = file.read(min(end - start, 128))
    at = 52 if header[:1] == b"\x01" else 40
    numbers = [int.from_bytes(header[at + 4 * k : at + 4 * k + 4], "big", signed=True) for k in (0, 1, 3, 4)]
    a, b, c, d = ((number > 0) - (number < 0) for number in numbers)
    return _QUARTER_TURNS.get((a, b, c, d), 0)


def _boxes(file: BinaryIO, kind: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the payloads of the boxes of that kind between `start` and `end`."""
    for _ in range(_MAX_BOXES):
        if start + _BOX_HEADER_BYTES > end:
            return
        file.seek(start)
        header: Any = file.read(16)
        length, payload = int.from_bytes(header[:4], "big"), start + _BOX_HEADER_BYTES
        if length == 1:
            length, payload = int.from_bytes(header[8:16], "big"), start + 2 * _BOX_HEADER_BYTES
        following = end if length == 0 else start + length
        if following < payload or following > end:
            return
        if header[4:8] == kind:
            yield payload, following
        start = following
