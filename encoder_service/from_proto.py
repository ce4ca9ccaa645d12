"""Media of an Open to plain values, with every limit that can be checked before their bytes come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encoder_service.config import EncoderConfig
from encoder_service.tiling import TilingOptions
from protos import encoder_pb2
from protos.errors import InvalidRequest
from protos.media import DEFAULT_NUM_FRAMES, FrameSampling, MediaKind
from protos.preprocessing import Preprocessing

_KINDS = {
    encoder_pb2.MEDIA_KIND_IMAGE: MediaKind.IMAGE,
    encoder_pb2.MEDIA_KIND_VIDEO: MediaKind.VIDEO,
    encoder_pb2.MEDIA_KIND_DOCUMENT: MediaKind.DOCUMENT,
}
_SAMPLING_FIELDS = ("num_frames", "fps", "start_s", "end_s")
_NAMES = {MediaKind.IMAGE: "picture", MediaKind.VIDEO: "video", MediaKind.DOCUMENT: "document"}


@dataclass(frozen=True)
class AnnouncedMedium:
    """A medium whose bytes are still to come, or to be fetched; nothing is left to defaults."""

    kind: MediaKind
    num_bytes: int
    tiling: TilingOptions
    sampling: FrameSampling | None  # of a video
    max_bytes: int
    url: str = ""  # where the encoder has to fetch it


def media_from_proto(
    media: Sequence[encoder_pb2.Medium], config: EncoderConfig, preprocessing: Preprocessing
) -> list[AnnouncedMedium]:
    """Raises InvalidRequest naming the first wrong field."""
    if not 1 <= len(media) <= config.max_media:
        raise InvalidRequest(f"{len(media)} media, must be in [1, {config.max_media}]", field="media")
    if sum(medium.num_bytes for medium in media) > config.max_stream_bytes:
        raise InvalidRequest(f"more than {config.max_stream_bytes} bytes of media", field="media")
    return [_medium(medium, config, preprocessing, f"media[{index}]") for index, medium in enumerate(media)]


def _medium(
    medium: encoder_pb2.Medium, config: EncoderConfig, preprocessing: Preprocessing, field: str
) -> AnnouncedMedium:
    kind = _KINDS.get(medium.kind)
    if kind is None:
        raise InvalidRequest("only pictures, videos and documents are supported", field=f"{field}.kind")
    limits = config.container_limits
    most = {
        MediaKind.IMAGE: config.image_limits.max_bytes,
        MediaKind.VIDEO: limits.max_video_bytes,
        MediaKind.DOCUMENT: limits.max_document_bytes,
    }[kind]
    if medium.num_bytes > most:
        message = f"the {_NAMES[kind]} has {medium.num_bytes} bytes, at most {most} are allowed"
        raise InvalidRequest(message, field=f"{field}.data")
    if medium.url and medium.num_bytes:
        raise InvalidRequest("a medium comes as bytes or by its URL, not both", field=f"{field}.url")
    is_video = kind is MediaKind.VIDEO
    tiling = _tiling(medium.tiling, config, preprocessing, is_video, f"{field}.tiling")
    sampling = _sampling(medium.sampling, limits.max_video_frames, f"{field}.sampling") if is_video else None
    return AnnouncedMedium(kind, medium.num_bytes, tiling, sampling, most, medium.url)


def _tiling(
    tiling: encoder_pb2.TilingOptions,
    config: EncoderConfig,
    defaults: Preprocessing,
    is_video: bool,
    field: str,
) -> TilingOptions:
    # A checkpoint whose own default is larger must stay usable with it.
    most = max(config.max_tiles, defaults.max_tiles)
    max_tiles = tiling.max_tiles if tiling.HasField("max_tiles") else 1 if is_video else defaults.max_tiles
    min_tiles = tiling.min_tiles if tiling.HasField("min_tiles") else min(defaults.min_tiles, max_tiles)
    if not 1 <= max_tiles <= most:
        raise InvalidRequest(f"max_tiles is {max_tiles}, must be in [1, {most}]", field=f"{field}.max_tiles")
    if not 1 <= min_tiles <= max_tiles:
        raise InvalidRequest(
            f"min_tiles is {min_tiles}, must be in [1, {max_tiles}]", field=f"{field}.min_tiles"
        )
    thumbnail = tiling.use_thumbnail if tiling.HasField("use_thumbnail") else defaults.use_thumbnail
    return TilingOptions(min_tiles, max_tiles, thumbnail)


def _sampling(sampling: encoder_pb2.FrameSampling, max_frames: int, field: str) -> FrameSampling:
    given = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)}
    given.setdefault("num_frames", max_frames if "fps" in given else min(DEFAULT_NUM_FRAMES, max_frames))
    try:
        plain = FrameSampling(**given)
    except ValueError as error:
        raise InvalidRequest(str(error), field=f"{field}.{str(error).partition(' ')[0]}") from None
    if plain.num_frames > max_frames:
        message = f"num_frames is {plain.num_frames}, must be in [1, {max_frames}]"
        raise InvalidRequest(message, field=f"{field}.num_frames")
    return plain
