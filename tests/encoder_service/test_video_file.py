"""Frames of real files: the right ones, upright, and nothing of what is corrupt."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw

from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import StoredPart, Undecodable
from encoder_service.video_file import CODEC_NAMES, CORRUPT, open_video, read_frames
from protos.media import FrameSampling
from tests.media_files import number_to_grey, numbered_frames, sound, video

LIMITS = ContainerLimits()
COUNT = 40
FRAMES = numbered_frames(COUNT)
MP4 = video(FRAMES, fps=10)


def opened(
    data: bytes, format: str = "mov", limits: ContainerLimits = LIMITS, **sampling: float
) -> list[StoredPart]:
    return open_video(io.BytesIO(data), format, FrameSampling(**sampling), limits)  # type: ignore[arg-type]


def frame_numbers(data: bytes, format: str, parts: Sequence[StoredPart]) -> list[int]:
    """Which of the numbered frames these are, by their brightness."""
    greys = [number_to_grey(number, COUNT) for number in range(COUNT)]
    means = [pixels.mean() for pixels in read_frames(io.BytesIO(data), format, parts, LIMITS)]
    return [int(np.abs(np.array(greys) - mean).argmin()) for mean in means]


@pytest.mark.parametrize(
    ("container", "format", "codec", "options"),
    [
        ("mp4", "mov", "h264", {}),
        ("mp4", "mov", "h264", {"g": "5", "bf": "3"}),
        ("mov", "mov", "mpeg4", {"g": "12", "b": "4000000"}),
        ("mp4", "mov", "libx265", {"x265-params": "log-level=none:keyint=7"}),
        ("webm", "matroska", "libvpx-vp9", {}),
        ("webm", "matroska", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "10"}),
        ("matroska", "matroska", "h264", {"g": "9"}),
    ],
)
def test_the_sampled_frames_are_the_ones_that_are_decoded(
    container: str, format: str, codec: str, options: dict[str, str]
) -> None:
    data = video(FRAMES, 10, container, codec, options=options)
    parts = opened(data, format, num_frames=6)
    assert [round(part.timestamp_s * 10) for part in parts] == [3, 9, 16, 23, 29, 35]
    assert frame_numbers(data, format, parts) == [3, 9, 16, 23, 29, 35]


def test_any_run_of_frames_gives_the_same_pixels_as_all_together() -> None:
    """What a resume after an encoder's failure relies on."""
    data = video(FRAMES, 10, options={"g": "7"})
    parts = opened(data, num_frames=COUNT)
    whole = list(read_frames(io.BytesIO(data), "mov", parts, LIMITS))
    for start, end in ((0, 1), (13, 15), (30, COUNT), (COUNT - 1, COUNT)):
        some = list(read_frames(io.BytesIO(data), "mov", parts[start:end], LIMITS))
        assert all(np.array_equal(a, b) for a, b in zip(some, whole[start:end], strict=True))


def test_bounds_and_rates_choose_by_time() -> None:
    parts = opened(MP4, num_frames=128, fps=2, start_s=1, end_s=3)
    assert len(parts) == 4 and all(1 <= part.timestamp_s <= 3 for part in parts)


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_turned_video_is_upright(turned: int) -> None:
    image = Image.new("RGB", (96, 64), "black")
    ImageDraw.Draw(image).rectangle((0, 0, 40, 24), "white")  # in the top left
    parts = opened(video([image] * 3, turned=turned))
    upright = image.rotate(turned, expand=True)
    assert (parts[0].width, parts[0].height) == upright.size
    [pixels] = read_frames(io.BytesIO(video([image] * 3, turned=turned)), "mov", parts[:1], LIMITS)
    expected = np.asarray(upright)
    assert np.abs(pixels.astype(int) - expected).mean() < 8


def test_what_headers_say_of_the_length_does_not_count() -> None:
    expected = opened(MP4, num_frames=5)
    for box, at in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        start = MP4.index(box) + at
        endless = MP4[:start] + b"\xff\xff\xff\xfe" + MP4[start + 4 :]
        assert opened(endless, num_frames=5) == expected


def test_a_table_of_endless_samples_is_corrupt() -> None:
    start = MP4.index(b"stsz") + 12
    with pytest.raises(Undecodable):
        opened(MP4[:start] + b"\xff\xff\xff\xff" + MP4[start + 4 :])


@pytest.mark.parametrize(
    ("data", "format", "problem"),
    [
        (sound(), "mov", "the file has no video stream"),
        (MP4[: len(MP4) // 2], "mov", CORRUPT),
        (MP4[:-3] if MP4.rindex(b"moov") < MP4.rindex(b"mdat") else MP4[:200], "mov", CORRUPT),
        (MP4, "matroska", CORRUPT),
        (b"\x00\x00\x00\x20ftypisom" + bytes(100), "mov", CORRUPT),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "matroska", CORRUPT),
        (
            video(FRAMES[:2], 10, "matroska", "ffv1"),
            "matroska",
            f"the video's codec is not supported; supported are {CODEC_NAMES}",
        ),
    ],
)
def test_what_cannot_be_opened_is_named(data: bytes, format: str, problem: str) -> None:
    with pytest.raises(Undecodable) as caught:
        opened(data, format)
    assert str(caught.value) == problem


def test_a_fragmented_file_that_is_cut_is_corrupt() -> None:
    movie = video(FRAMES, container_options={"movflags": "frag_keyframe+empty_moov"})
    assert len(opened(movie)) == 8
    with pytest.raises(Undecodable):
        opened(movie[: len(movie) * 2 // 3])


def test_garbage_for_frames_is_corrupt() -> None:
    start = MP4.index(b"mdat") + 4
    broken = MP4[:start] + bytes(600) + MP4[start + 600 :]
    parts = opened(broken)
    with pytest.raises(Undecodable, match=CORRUPT):
        list(read_frames(io.BytesIO(broken), "mov", parts, LIMITS))


def test_too_many_frames_and_too_many_pixels_are_refused_from_headers() -> None:
    with pytest.raises(Undecodable, match="the video has more than 39 frames"):
        opened(MP4, limits=ContainerLimits(max_stored_frames=39))
    with pytest.raises(Undecodable, match="each frame is 64 x 48 pixels: at most 3000 pixels are decoded"):
        opened(MP4, limits=ContainerLimits(max_part_pixels=3000))


def test_a_start_behind_the_end_is_named() -> None:
    with pytest.raises(Undecodable, match=r"start_s is 5, but the video ends at 3.9 s"):
        opened(MP4, start_s=5)
