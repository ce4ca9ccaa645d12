"""What a request asks for, checked and resolved, before anything is known about its media's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_service.picture import Picture
from llm_service.prompt import Message
from llm_service.response_format import ResponseFormat
from llm_service.sampling_params import SamplingParams
from llm_service.tools import ToolUse
from protos.fingerprint import content_hash
from protos.media import FrameSampling, MediaKind
from protos.request_context import Metadata


@dataclass(frozen=True)
class MediumInput:
    """A picture, video or document, options resolved; `field` is its path in the request, for errors."""

    data: bytes
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    field: str
    kind: MediaKind = MediaKind.IMAGE
    sampling: FrameSampling | None = None  # of a video
    url: str = ""  # instead of data


@dataclass(frozen=True)
class GenerationInput:
    messages: list[Message]  # empty when prompt_token_ids are given
    prompt_token_ids: list[int]
    media: list[MediumInput]  # in the order of the messages' media parts
    params: SamplingParams
    priority: int
    cache_salt: bytes
    metadata: Metadata  # request id and trace context, for the encoder
    response_format: ResponseFormat | None = None
    tools: ToolUse | None = None
    thinking: bool | None = None  # None: the model's own habit


def hash_media(media: Sequence[MediumInput], fingerprint: bytes) -> list[Picture]:
    """Each with the name by which caches know it; takes about a millisecond a megabyte."""
    return [
        Picture(
            medium.data,
            medium.min_tiles,
            medium.max_tiles,
            medium.use_thumbnail,
            content_hash(
                medium.data or medium.url.encode(),
                medium.min_tiles,
                medium.max_tiles,
                medium.use_thumbnail,
                fingerprint,
                medium.kind,
                medium.sampling,
            ),
            fingerprint,
            medium.kind,
            medium.sampling,
            medium.url,
        )
        for medium in media
    ]
