"""Pictures as an Encode call knows them, videos and documents included: bytes, layout, and names of tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from protos.media import FrameSampling, MediaKind


@dataclass(frozen=True)
class Picture:
    """One medium with its tiling options resolved."""

    data: bytes  # empty where there is a URL
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    content_hash: bytes  # of a URL one of its text, which says where it belongs and nothing of what is there
    fingerprint: bytes  # that the hash was made with
    kind: MediaKind = MediaKind.IMAGE
    sampling: FrameSampling | None = None  # of a video
    url: str = ""  # that the encoder has to fetch


@dataclass(frozen=True)
class PartGrid:
    """How one picture, frame or page was cut.  For people to look at: nothing is computed from it."""

    width: int  # pixels, upright
    height: int
    columns: int
    rows: int
    has_thumbnail: bool
    num_tiles: int  # with the thumbnail
    timestamp_s: float = 0.0  # of a frame


@dataclass(frozen=True)
class PictureLayout:
    tokens_per_tile: tuple[int, ...]
    part_tiles: tuple[int, ...] = ()  # tiles of each frame or page; of a picture nothing
    fetched_hash: bytes = b""  # of a URL: the content hash of what the encoder found there
    grids: tuple[PartGrid, ...] = field(default=(), compare=False)  # of each frame or page; of a picture one

    @property
    def num_tiles_of_parts(self) -> tuple[int, ...]:
        """A picture is its only part."""
        return self.part_tiles or (len(self.tokens_per_tile),)

    @property
    def tokens_per_part(self) -> list[int]:
        tokens = iter(self.tokens_per_tile)
        return [sum(islice(tokens, count)) for count in self.num_tiles_of_parts]

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_per_tile)


@dataclass(frozen=True)
class TileId:
    medium: int
    tile: int
