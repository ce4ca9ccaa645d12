"""Bytes of a picture to its size, from the header alone, and to RGB pixels, within limits.

Knows Pillow's decoders; knows nothing about tiles, transport or the model.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from protos.errors import InvalidRequest

FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
CORRUPT = "the picture is truncated, corrupt or of an unsupported kind"

# Plugin classes instead of Image.open: Image.open checks sizes against a process-wide setting and warns;
# here `ImageLimits` is the only limit.  JpegImageFile reads the first picture of an MPO file.
_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II\x2a\x00", "TIFF"),
    (b"MM\x00\x2a", "TIFF"),
    (b"II\x2b\x00", "TIFF"),  # BigTIFF
    (b"MM\x00\x2b", "TIFF"),
)
# EXIF 2.32, tag 0x0112: what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 258, 322, 323
# Chunks searched for a PNG's orientation; a file of nothing but tiny chunks must not cost seconds.
_MAX_PNG_CHUNKS = 1 << 16
# Per pixel, while decoding, converting and turning; measured over modes and formats: up to 13.1 (32-bit gray
# and turned RGB), of WebP, whose library keeps canvases of its own, up to 20.2.
_DECODE_BYTES, _WEBP_DECODE_BYTES = 14, 22
# Each scan of a progressive JPEG is a pass over all pixels; encoders write about 10.
_MAX_JPEG_SCANS = 64
# Metadata comes in segments of 64 KiB; a file of nothing but tiny ones must not cost seconds.
_MAX_JPEG_MARKERS = 4096
_MAX_JPEG_FILL = 1 << 16  # bytes between them, which Pillow passes over one by one
# ITU T.81, B.1.1.2: a marker is neither a stuffed byte nor one of the restarts within a scan.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE, _FIRST_WITH_LENGTH, _START_OF_IMAGE = 0xDA, 0xD9, 0xC0, 0xD8


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost, checked before any pixel is decoded."""

    max_bytes: int = field(default=20 << 20, metadata={"help": "most bytes of one picture's file"})
    max_side: int = field(default=16_384, metadata={"help": "most pixels of a picture's longer side"})
    max_pixels: int = field(default=64_000_000, metadata={"help": "most pixels of one picture"})
    min_side: int = field(default=2, metadata={"help": "fewest pixels of a picture's shorter side"})
    max_aspect_ratio: float = field(
        default=200.0, metadata={"help": "most that the longer side may be of the shorter one"}
    )

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_side", "max_pixels", "min_side", "max_aspect_ratio"):
            if not getattr(self, name) >= 1:  # NaN is not
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ImageHeader:
    """Format by content ("JPEG", "PNG", ...) and size in pixels after EXIF rotation."""

    format: str
    width: int
    height: int
    decode_bytes: int  # most memory while the picture is decoded


@dataclass(frozen=True)
class _Opened:
    """A picture whose header is read and whose pixels are not."""

    header: ImageHeader
    image: ImageFile
    orientation: int  # still to be undone after loading; 1 is upright


def read_header(data: bytes | memoryview, limits: ImageLimits, field: str) -> ImageHeader:
    """Format and size of a picture, from its header.

    Args:
        data: The whole file.
        field: Request field that messages name, such as "media[0].data".

    Raises:
        InvalidRequest: not a supported picture, corrupt, or beyond a limit.
    """
    return _open(data, limits, field).header


def decode_image(data: bytes | memoryview, limits: ImageLimits, field: str) -> Image.Image:
    """The picture as upright RGB, of exactly the size that `read_header` says.

    Transparency is composited over white, 16-bit samples are scaled to 8, of animations and multi-page
    files the first frame is taken. A plain RGB picture equals Pillow's `convert("RGB")`.

    Raises:
        InvalidRequest: as `read_header`, or the pixels are truncated, corrupt or of an unsupported kind.
    """
    opened = _open(data, limits, field)
    with _corrupt_is_invalid(field):
        opened.image.load()
        picture = _to_rgb(opened.image)
        if opened.orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[opened.orientation])
    if picture.size != (opened.header.width, opened.header.height):
        raise InvalidRequest("the picture has pixels of another size than its header says", field=field)
    return picture


def _open(data: bytes | memoryview, limits: ImageLimits, field: str) -> _Opened:
    if len(data) > limits.max_bytes:
        raise InvalidRequest(
            f"the picture has {len(data)} bytes; at most {limits.max_bytes} are accepted", field=field
        )
    kind = _sniff(bytes(data[:16]))
    if kind is None:
        raise InvalidRequest(f"this is not a {FORMAT_NAMES} picture", field=field)
    if kind == "WEBP":  # the plugin's decoder allocates the canvas as soon as it is created
        _check_size(_webp_canvas(bytes(data[:30]), field), limits, field)
    if kind == "JPEG":
        _check_scans(data, field)
    with _corrupt_is_invalid(field):
        image = _PLUGINS[kind](io.BytesIO(data))
        size, orientation = _stored_size(image), _orientation(image, data)
    if orientation >= 5:
        size = size[::-1]
    _check_size(size, limits, field)
    num_pixels = math.prod(size)
    if isinstance(image, TiffImageFile):
        num_pixels += _tiff_tile_pixels(image, limits, field)
        orientation = 1  # TiffImageFile turns the picture upright itself
    decode_bytes = num_pixels * (_WEBP_DECODE_BYTES if kind == "WEBP" else _DECODE_BYTES)
    return _Opened(ImageHeader(kind, *size, decode_bytes), image, orientation)


@contextmanager
def _corrupt_is_invalid(field: str) -> Iterator[None]:
    """Decoders raise nearly anything on bad input; their text may hold addresses, so it is not passed on."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidRequest(CORRUPT, field=field) from error


def _sniff(head: bytes) -> str | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)


def _webp_canvas(head: bytes, field: str) -> tuple[int, int]:
    """Canvas of a WebP file from its first chunk (RFC 9649, sections 2.5 to 2.7)."""
    chunk, payload = head[12:16], head[20:30]
    if len(head) == 30 and chunk == b"VP8X":
        return 1 + int.from_bytes(payload[4:7], "little"), 1 + int.from_bytes(payload[7:10], "little")
    if len(head) == 30 and chunk == b"VP8L":
        bits = int.from_bytes(payload[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if len(head) == 30 and chunk == b"VP8 ":
        width, height = (int.from_bytes(payload[at : at + 2], "little") for at in (6, 8))
        return width & 0x3FFF, height & 0x3FFF
    raise InvalidRequest(CORRUPT, field=field)


def _check_scans(data: bytes | memoryview, field: str) -> None:
    """Count scans as libjpeg meets them, up to the end of the first picture; linear in the bytes."""
    position, num_scans, num_skipped = 2, 0, 0
    for _ in range(_MAX_JPEG_MARKERS):
        found = _JPEG_MARKER.search(data, position)
        if num_scans == 0:
            num_skipped += (len(data) if found is None else found.start()) - position
        if num_skipped > _MAX_JPEG_FILL:
            raise InvalidRequest(CORRUPT, field=field)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        marker, position = found[1][0], found.end()
        num_scans += marker == _START_OF_SCAN
        if num_scans > _MAX_JPEG_SCANS:
            raise InvalidRequest(
                f"the picture has more than {_MAX_JPEG_SCANS} JPEG scans; "
                f"at most {_MAX_JPEG_SCANS} are decoded",
                field=field,
            )
        if marker >= _FIRST_WITH_LENGTH and marker != _START_OF_IMAGE:
            position += int.from_bytes(data[position : position + 2], "big")
    raise InvalidRequest(f"the picture has more than {_MAX_JPEG_MARKERS} JPEG segments", field=field)


def _check_size(size: tuple[int, int], limits: ImageLimits, field: str) -> None:
    width, height = size
    shorter, longer = sorted(size)
    problem = None
    if shorter < 1:
        problem = "an empty picture"
    elif longer > limits.max_aspect_ratio * shorter:
        problem = f"the longer side may be at most {limits.max_aspect_ratio:g} times the shorter one"
    elif shorter < limits.min_side:
        problem = f"each side must be at least {limits.min_side} pixels"
    elif longer > limits.max_side:
        problem = f"each side may be at most {limits.max_side} pixels"
    elif width * height > limits.max_pixels:
        problem = f"at most {limits.max_pixels} pixels are decoded"
    if problem is not None:
        raise InvalidRequest(f"the picture is {width} x {height} pixels: {problem}", field=field)


def _stored_size(image: ImageFile) -> tuple[int, int]:
    """Size as stored; Pillow's `size` of a TIFF is already that of the upright picture."""
    if isinstance(image, TiffImageFile):
        return int(image.tag_v2[_TIFF_WIDTH]), int(image.tag_v2[_TIFF_HEIGHT])
    return image.size


def _tiff_tile_pixels(image: TiffImageFile, limits: ImageLimits, field: str) -> int:
    """The decoder's buffer is one TIFF tile, whose size does not depend on the picture's."""
    tile = [int(image.tag_v2.get(tag, 0)) for tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT)]
    if math.prod(tile) > limits.max_pixels:
        raise InvalidRequest(
            f"the picture has TIFF tiles of {tile[0]} x {tile[1]} pixels: "
            f"at most {limits.max_pixels} pixels are decoded",
            field=field,
        )
    return math.prod(tile)


def _orientation(image: ImageFile, data: bytes | memoryview) -> int:
    """EXIF orientation, 1 to 8, without loading pixels; unreadable metadata turns nothing."""
    if isinstance(image, PngImageFile) and "exif" not in image.info:
        late = _png_exif(data)
        if late is not None:
            image.info["exif"] = b"Exif\x00\x00" + late
    try:
        # The base method: PngImageFile's own decodes the pixels in search of late metadata.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _png_exif(data: bytes | memoryview) -> bytes | None:
    """The eXIf chunk wherever it stands: some editors append it behind the pixels."""
    position = 8
    for _ in range(_MAX_PNG_CHUNKS):
        if position + 8 > len(data):
            return None
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return bytes(data[position + 8 : position + 8 + length])
        position += 12 + length
    return None


def _to_rgb(image: ImageFile) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point samples have no agreed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _deep_gray_to_rgb(image)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)  # the same pixels as alpha_composite over opaque white, at less memory
        return white
    return image.convert("RGB")


def _deep_gray_to_rgb(image: ImageFile) -> Image.Image:
    """High byte of each sample, as Pillow takes it of 16-bit RGB; its own conversion from gray clips at 255.

    Mode "I" holds 32-bit samples of unknown range: 16 bits unless the picture has larger ones.
    """
    samples = np.maximum(np.asarray(image), 0)  # [height, width]
    num_bits = max(16, int(samples.max()).bit_length())
    if isinstance(image, TiffImageFile) and image.mode != "I":
        num_bits = int(image.tag_v2.get(_TIFF_BITS, (16,))[0])
    gray = (samples >> (num_bits - 8)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
