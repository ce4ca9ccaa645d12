"""Which frames of a video are taken, from its length alone.  Knows nothing about files."""

from __future__ import annotations

from protos.media import FrameSampling


def sample_frames(num_stored: int, stored_fps: float, sampling: FrameSampling) -> list[int]:
    """Indices of the frames, ascending; neighbours may be equal, as in the reference.

    Source: `get_index` of InternVL's examples (and `load_video` of its evaluation). Deviations: no more
    frames than there are between start and end, and a start behind the video's end is an error.

    Raises:
        ValueError: there is no frame behind the start.
    """
    last = num_stored - 1
    start = round(sampling.start_s * stored_fps)
    if start > last:
        raise ValueError(f"start_s is {sampling.start_s:g}, but the video ends at {last / stored_fps:.3g} s")
    end = last if sampling.end_s * stored_fps > last else round(sampling.end_s * stored_fps)
    num_frames = min(sampling.num_frames, end - start + 1)
    if sampling.fps:
        num_frames = min(num_frames, max(1, int((end - start + 1) / stored_fps * sampling.fps)))
    step = (end - start) / num_frames
    return [int(start + step / 2 + round(step * number)) for number in range(num_frames)]
