from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from encoder_service.media import ImageLimits, decode_image, read_header
from protos.errors import InvalidRequest

LIMITS = ImageLimits()
FIELD = "media[0].data"
ORIENTATION = 0x0112

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # on the damaged files made here


def picture(width: int = 37, height: int = 23) -> Image.Image:
    """Smooth enough for lossy formats to stay close, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((x, y, 255 - x), axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """Pixels, after checking that the header foretold their size."""
    header, image = read_header(data, LIMITS, FIELD), decode_image(data, LIMITS, FIELD)
    assert image.mode == "RGB"
    assert image.size == (header.width, header.height)
    return np.asarray(image).astype(int)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def refusal(data: bytes, limits: ImageLimits = LIMITS, header_only: bool = True) -> str:
    """Message of the refusal, whose field is the picture's; the header suffices unless said otherwise."""
    with pytest.raises(InvalidRequest) as caught:
        (read_header if header_only else decode_image)(data, limits, FIELD)
    assert caught.value.field == FIELD
    assert FIELD not in caught.value.message  # a client may know the picture under another name
    return caught.value.message


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    checksum = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", checksum)


def with_png_chunk(png: bytes, chunk: bytes, before: bytes) -> bytes:
    at = png.index(before) - 4
    return png[:at] + chunk + png[at:]


RGB_FILES = {
    "JPEG": encoded(picture(), "JPEG", quality=90),
    "progressive JPEG": encoded(picture(), "JPEG", progressive=True),
    "PNG": encoded(picture(), "PNG"),
    "WEBP": encoded(picture(), "WEBP"),
    "lossless WEBP": encoded(picture(), "WEBP", lossless=True),
    "GIF": encoded(picture(), "GIF"),
    "BMP": encoded(picture(), "BMP"),
    "TIFF": encoded(picture(), "TIFF"),
    "deflated TIFF": encoded(picture(), "TIFF", compression="tiff_adobe_deflate"),
    "big TIFF": encoded(picture(), "TIFF", big_tiff=True),
    "MPO": encoded(picture(), "MPO", save_all=True, append_images=[picture(10, 40)]),
    "gray JPEG": encoded(picture().convert("L"), "JPEG"),
    "gray PNG": encoded(picture().convert("L"), "PNG"),
    "palette PNG": encoded(picture().quantize(32), "PNG"),
    "1-bit PNG": encoded(picture().convert("1"), "PNG"),
    "1-bit TIFF": encoded(picture().convert("1"), "TIFF", compression="group4"),
}


@pytest.mark.parametrize("name", RGB_FILES)
def test_opaque_pictures_are_pixel_identical_to_pillows_conversion(name) -> None:
    assert np.array_equal(decoded(RGB_FILES[name]), by_pillow(RGB_FILES[name]))
    assert decoded(RGB_FILES[name]).shape == (23, 37, 3)


@pytest.mark.parametrize("name", RGB_FILES)
def test_the_format_is_that_of_the_content(name) -> None:
    kind = "JPEG" if name == "MPO" else name.split()[-1]
    header = read_header(RGB_FILES[name], LIMITS, FIELD)
    assert (header.format, header.width, header.height) == (kind, 37, 23)


def test_a_memoryview_is_read_like_bytes() -> None:
    data = RGB_FILES["PNG"]
    assert decode_image(memoryview(data), LIMITS, FIELD) == decode_image(data, LIMITS, FIELD)
    assert read_header(memoryview(data), LIMITS, FIELD).width == 37


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_in_header_and_pixels(kind, orientation) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(), kind, exif=exif, **lossless)
    stored = decoded(encoded(picture(), kind, **lossless))
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(decoded(data), turned[orientation])


def test_orientation_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00"))
    data = with_png_chunk(encoded(picture(), "PNG"), chunk, before=b"IEND")
    assert (read_header(data, LIMITS, FIELD).width, read_header(data, LIMITS, FIELD).height) == (23, 37)
    assert decoded(data).shape == (37, 23, 3)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"])
def test_unreadable_exif_turns_nothing(exif) -> None:
    data = encoded(picture(), "JPEG", exif=exif)
    assert np.array_equal(decoded(data), decoded(encoded(picture(), "JPEG")))


def test_an_unknown_orientation_turns_nothing() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    assert decoded(encoded(picture(), "JPEG", exif=exif)).shape == (23, 37, 3)


def half_transparent(mode: str) -> Image.Image:
    """Left half invisible black, right half opaque gray 60."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (4, 0, 8, 4))
    shade = Image.new(mode.removesuffix("A"), (8, 4))
    shade.paste(60 if mode == "LA" else (60, 60, 60), (4, 0, 8, 4))
    shade.putalpha(alpha)
    return shade


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")]
)
def test_alpha_is_composited_over_white(mode, kind) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    pixels = decoded(encoded(half_transparent(mode), kind, **lossless))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 60).all()


def test_partial_alpha_mixes_with_white() -> None:
    pixels = decoded(encoded(Image.new("RGBA", (4, 4), (0, 100, 200, 128)), "PNG"))
    expected = [255 - 128, 255 - 155 * 128 // 255, 255 - 55 * 128 // 255]
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_a_transparent_color_of_a_png_becomes_white(mode) -> None:
    image = Image.new(mode, (4, 4), 0)
    if mode == "P":
        image.putpalette([10, 20, 30, 90, 90, 90])
    image.paste((90, 90, 90) if mode == "RGB" else 1, (2, 0, 4, 4))
    transparency = (0, 0, 0) if mode == "RGB" else 0
    pixels = decoded(encoded(image, "PNG", transparency=transparency))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == {"L": 1, "P": 90, "RGB": 90, "1": 255}[mode]).all()


def test_palette_alpha_per_entry_is_composited_over_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.paste(1, (2, 0, 4, 4))
    pixels = decoded(encoded(image, "PNG", transparency=bytes([0, 255])))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


def test_a_transparent_gif_is_composited_over_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (2, 0, 4, 4))
    pixels = decoded(encoded(image, "GIF", transparency=0))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == [0, 0, 200]).all()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_16_bit_gray_is_scaled_not_clipped(kind, mode) -> None:
    samples = np.linspace(0, 65535, 64).reshape(8, 8).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (8, 8), samples.tobytes())
    pixels = decoded(encoded(image, kind))
    assert np.array_equal(pixels, np.repeat((samples // 256).astype(int)[..., None], 3, axis=2))
    assert len(np.unique(pixels)) == 64


def test_the_transparent_sample_of_a_16_bit_png_becomes_white() -> None:
    samples = np.array([[1000, 40000], [1000, 1001]], dtype="<u2")
    png = encoded(Image.frombytes("I;16", (2, 2), samples.tobytes()), "PNG")
    data = with_png_chunk(png, png_chunk(b"tRNS", struct.pack(">H", 1000)), before=b"IDAT")
    assert decoded(data)[..., 0].tolist() == [[255, 156], [255, 3]]


def test_16_bit_color_is_scaled() -> None:
    samples = np.linspace(0, 65535, 4 * 4 * 3).reshape(4, 4, 3).astype(">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert np.array_equal(decoded(data), (samples // 256).astype(int))


@pytest.mark.parametrize(
    ("largest", "expected"), [(65535, [0, 127, 255]), (2**31 - 1, [0, 127, 255]), (40000, [0, 78, 156])]
)
def test_32_bit_gray_is_scaled_not_clipped(largest, expected) -> None:
    image = Image.fromarray(np.array([[0, largest // 2, largest], [0, 0, 0]], dtype=np.int32))
    assert image.mode == "I"
    assert decoded(encoded(image, "TIFF"))[0, :, 0].tolist() == expected


def test_floating_point_samples_are_refused() -> None:
    refusal(encoded(Image.new("F", (4, 4), 0.5), "TIFF"), header_only=False)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("ink", "color"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 255, 255, 0), (255, 0, 0))],
)
def test_cmyk_is_converted_by_ink(kind, ink, color) -> None:
    """Pillow writes CMYK JPEGs inverted and with Adobe's marker, as Photoshop does."""
    data = encoded(Image.new("CMYK", (16, 16), ink), kind)
    assert (b"Adobe" in data) is (kind == "JPEG")
    assert np.abs(decoded(data) - color).max() <= 1


def test_adobe_ycck_is_converted() -> None:
    """Planes Y 200, Cb 128, Cr 128, K 255 (inverted: no black): ink 255 - 200 inverted, so gray 55."""
    planes = Image.new("CMYK", (16, 16), (255 - 200, 255 - 128, 255 - 128, 0))
    data = bytearray(encoded(planes, "JPEG", quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2  # YCCK
    assert np.abs(decoded(bytes(data)) - 55).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(kind) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decoded(data) == [250, 0, 0]).all()


def test_bytes_behind_the_picture_are_ignored() -> None:
    data = RGB_FILES["PNG"]
    assert np.array_equal(decoded(data + b"<html>" * 100), decoded(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"%PDF-1.7",
        encoded(picture(), "PPM"),
        encoded(picture(), "ICO", sizes=[(16, 16)]),
        encoded(picture(), "TGA"),
        encoded(picture(), "JPEG2000"),
    ],
    ids=["empty", "zeros", "svg", "eps", "pdf", "ppm", "ico", "tga", "jpeg2000"],
)
def test_what_is_not_a_supported_picture_is_refused_by_content(data) -> None:
    assert "JPEG, PNG, WebP, GIF, BMP or TIFF" in refusal(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_truncated_pictures_are_refused(kind, share) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    message = refusal(whole[: int(len(whole) * share)], header_only=False)
    assert "truncated, corrupt" in message


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_lzw", "jpeg", "packbits"])
def test_truncated_compressed_tiffs_are_refused(compression) -> None:
    whole = encoded(picture(480, 640), "TIFF", compression=compression)
    assert decoded(whole).shape == (640, 480, 3)
    refusal(whole[: len(whole) // 2], header_only=False)


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_noise_behind_a_signature_is_refused_without_the_librarys_words(name) -> None:
    noise = np.random.default_rng(1).integers(0, 256, 500, dtype=np.uint8).tobytes()
    message = refusal(RGB_FILES[name][:16] + noise, header_only=False)
    allowed = ("truncated, corrupt or of an unsupported kind", "pixels")
    assert any(words in message for words in allowed)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "deflated TIFF"])
def test_any_damaged_byte_gives_a_picture_or_a_refusal(name) -> None:
    whole = RGB_FILES[name]
    source = np.random.default_rng(5)
    for _ in range(150):
        damaged = bytearray(whole)
        for at in source.integers(0, len(whole), 3):
            damaged[at] = source.integers(0, 256)
        try:
            image = decode_image(bytes(damaged), LIMITS, FIELD)
        except InvalidRequest as error:
            assert error.field == FIELD
        else:
            header = read_header(bytes(damaged), LIMITS, FIELD)
            assert image.size == (header.width, header.height)


def png_header(width: int, height: int, bit_depth: int = 1) -> bytes:
    """A PNG of that size whose few pixel bytes are missing: reading more than its header would fail."""
    chunk = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [
        (1, 1, "at least 2 pixels"),
        (2, 1, "at least 2 pixels"),
        (1, 20_000, "at most 200 times"),
        (20_000, 50, "at most 200 times"),
        (16_385, 200, "at most 16384 pixels"),
        (30_000, 30_000, "at most 16384 pixels"),
        (9_000, 9_000, "at most 64000000 pixels"),
        (0, 10, "empty"),
    ],
)
def test_sizes_beyond_a_limit_are_refused_with_it(width, height, limit) -> None:
    message = refusal(png_header(width, height))
    assert limit in message or (width == 0 and "corrupt" in message)


def test_sizes_at_the_limits_are_read() -> None:
    for width, height in ((2, 2), (2, 400), (16_384, 100), (8_000, 8_000)):
        header = read_header(png_header(width, height), LIMITS, FIELD)
        assert (header.width, header.height) == (width, height)


@pytest.mark.parametrize("limits", [LIMITS, ImageLimits(max_side=100_000)], ids=["side", "pixels"])
def test_a_30000_by_30000_png_bomb_is_refused_at_once(limits) -> None:
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(3751) * 1000) for _ in range(30)) + rows.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    started = time.perf_counter()
    assert "30000 x 30000 pixels" in refusal(bomb, limits)
    assert "30000 x 30000 pixels" in refusal(bomb, limits, header_only=False)
    assert time.perf_counter() - started < 1


def gif_bomb() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + bytes(40)


def jpeg_bomb() -> bytes:
    data = RGB_FILES["JPEG"]
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", 65_000, 65_000) + data[frame + 9 :]


def webp_bomb() -> bytes:
    side = (16_383 - 1).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


def bmp_bomb() -> bytes:
    data = bytearray(RGB_FILES["BMP"])
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    return bytes(data)


def tiff_bomb() -> bytes:
    """A TIFF directory of just a width and a height of 60,000."""
    entries = [(256, 60_000), (257, 60_000), (258, 8), (259, 1), (262, 1), (273, 8), (279, 8)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("make", [gif_bomb, jpeg_bomb, webp_bomb, bmp_bomb, tiff_bomb])
def test_bombs_of_other_formats_are_refused_by_our_limit(make) -> None:
    message = refusal(make())
    assert "pixels are decoded" in message or "each side may be at most 16384 pixels" in message


def tiff_of_tiles(side: int) -> bytes:
    """The directory of 64 x 64 pixels in one tile of that side."""
    entries = [
        (256, 64),
        (257, 64),
        (258, 8),
        (259, 8),
        (262, 1),
        (322, side),
        (323, side),
        (324, 8),
        (325, 8),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


def test_a_tiff_of_huge_tiles_is_refused() -> None:
    assert "TIFF tiles of 65536 x 65536" in refusal(tiff_of_tiles(65_536))


def test_metadata_bombs_are_refused() -> None:
    bomb = zlib.compress(bytes(100 << 20), 9)
    png = encoded(picture(), "PNG")
    for chunk in (png_chunk(b"zTXt", b"Comment\x00\x00" + bomb), png_chunk(b"iCCP", b"icc\x00\x00" + bomb)):
        assert "corrupt" in refusal(with_png_chunk(png, chunk, before=b"IDAT"))
    late = with_png_chunk(png, png_chunk(b"zTXt", b"Comment\x00\x00" + bomb), before=b"IEND")
    refusal(late, header_only=False)


def test_ordinary_metadata_is_accepted() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 10_000, zip=True)
    assert decoded(encoded(picture(), "PNG", pnginfo=text)).shape == (23, 37, 3)


def test_too_many_bytes_are_refused_before_they_are_looked_at() -> None:
    message = refusal(b"not even a picture" * 10, ImageLimits(max_bytes=100))
    assert "180 bytes" in message and "100" in message


def with_last_scan_repeated(data: bytes, times: int) -> bytes:
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * times + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    """300 copies of a flat 8000 x 8000 picture's last scan take 12 s."""
    progressive = RGB_FILES["progressive JPEG"]
    assert progressive.count(b"\xff\xda") == 10
    assert decoded(with_last_scan_repeated(progressive, 54)).shape == (23, 37, 3)
    assert "more than 64 JPEG scans" in refusal(with_last_scan_repeated(progressive, 55))


def test_scans_hidden_behind_a_reserved_marker_are_counted() -> None:
    """libjpeg passes over a reserved marker without a length where it looks for a restart."""
    data = with_last_scan_repeated(RGB_FILES["progressive JPEG"], 300)
    at = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    assert "JPEG scans" in refusal(data[:at] + b"\xff\x02\xff\xff" + data[at:])


def test_scans_of_other_pictures_in_the_file_do_not_count() -> None:
    """A thumbnail within the metadata, and what cameras append, such as a short film."""
    plain = encoded(picture(), "JPEG")
    thumbnail = b"\xff\xe2" + struct.pack(">H", 202) + b"\xff\xda" * 100
    data = plain[:2] + thumbnail + plain[2:] + b"\xff\xda" * 100
    assert np.array_equal(decoded(data), decoded(plain))


@pytest.mark.parametrize(
    "filler",
    [b"\xff\xff", b"\xff\x00", b"\xff\xd0", b"\x00\x00", b"\xff\x02", b"\xff\xfe\x00\x02", b"\xff\xd8"],
)
def test_looking_for_scans_is_fast_whatever_the_bytes(filler) -> None:
    data = RGB_FILES["progressive JPEG"][:-2]
    data += filler * ((LIMITS.max_bytes - len(data)) // len(filler))
    started = time.perf_counter()
    try:
        read_header(data, LIMITS, FIELD)
    except InvalidRequest as error:
        assert "JPEG segments" in error.message
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("filler", [b"\xff\xff", b"\xff\x00", b"\xff\xd0", b"\xff\xfe\x00\x02"])
@pytest.mark.parametrize("has_scans", [False, True])
def test_a_jpeg_that_begins_with_filling_is_refused_at_once(filler, has_scans) -> None:
    progressive = RGB_FILES["progressive JPEG"]
    filling = filler * ((LIMITS.max_bytes - len(progressive)) // len(filler))
    started = time.perf_counter()
    message = refusal(progressive[:2] + filling + (progressive[2:] if has_scans else b""))
    assert "corrupt" in message or "JPEG segments" in message
    assert time.perf_counter() - started < 1


def test_decoding_is_charged_per_pixel_and_higher_for_webp() -> None:
    """Above what Pillow takes: a picture, its copy as RGB and the turned copy, 4 bytes a pixel each."""
    charged = {name: read_header(data, LIMITS, FIELD).decode_bytes for name, data in RGB_FILES.items()}
    assert charged["JPEG"] == charged["PNG"] > 3 * 4 * 37 * 23
    assert charged["WEBP"] == charged["lossless WEBP"] > 5 * 4 * 37 * 23


def test_the_tile_of_a_tiff_is_charged_though_the_picture_is_small() -> None:
    tiled = tiff_of_tiles(2048)
    assert read_header(tiled, LIMITS, FIELD).decode_bytes > 4 * 2048 * 2048


def test_every_alpha_over_every_color_is_composited_as_pillow_does() -> None:
    shade, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = Image.fromarray(np.stack((shade, 255 - shade, shade, alpha), axis=-1).astype(np.uint8))
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    assert np.array_equal(decoded(encoded(rgba, "PNG")), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_bytes": -1}, "max_bytes must be >= 1, got -1"),
        ({"max_side": 0}, "max_side must be >= 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be >= 1, got 0"),
        ({"min_side": 0}, "min_side must be >= 1, got 0"),
        ({"max_aspect_ratio": float("nan")}, "max_aspect_ratio must be >= 1, got nan"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio must be >= 1, got 0.5"),
    ],
)
def test_a_limit_that_no_picture_can_keep_is_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImageLimits(**values)


def test_limits_hold_for_the_upright_picture_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(picture(40, 10), "JPEG", exif=exif)
    assert "at most 30 pixels" in refusal(data, ImageLimits(max_side=30))


def test_settings_of_the_image_library_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    refusal(png_header(30_000, 30_000))
    decode_image(RGB_FILES["PNG"], LIMITS, FIELD)
    assert Image.MAX_IMAGE_PIXELS == before
