"""What text stands on (surfaces, colours it can be read against) and what a camera does to the picture."""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from deploy.demo_training.colors import RGB, choose_rgb
from deploy.demo_training.sample import COLORS

MIN_CONTRAST = 3.2


def random_rgb(rng: random.Random) -> RGB:
    """Any colour at all; usually one without a name."""
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def luminance(color: RGB) -> float:
    """Relative luminance, 0 to 1 (WCAG 2, with a plain power of 2.2)."""
    red, green, blue = (float((channel / 255) ** 2.2) for channel in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: RGB, other: RGB) -> float:
    """Contrast ratio, 1 to 21 (WCAG 2)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def text_color(rng: random.Random, panel: RGB) -> tuple[str | None, RGB]:
    """A colour that can be read on `panel`, and its name if it has one."""
    for _ in range(4):
        name = rng.choice(COLORS) if rng.random() < 0.7 else None
        color = random_rgb(rng) if name is None else choose_rgb(rng, name)
        if contrast(color, panel) >= MIN_CONTRAST:
            return name, color
    name = max(("black", "white"), key=lambda word: contrast(choose_rgb(rng, word), panel))
    return name, choose_rgb(rng, name)


def background(rng: random.Random, size: tuple[int, int], level: float) -> Image.Image:
    """A surface or, from the middle of the levels on, clutter that a sign stands in front of."""
    kind = rng.random()
    if kind < 0.35 - 0.15 * level:
        return Image.new("RGB", size, random_rgb(rng))
    if kind < 0.6 - 0.15 * level:
        return gradient(rng, size, random_rgb(rng), random_rgb(rng))
    if kind < 0.75:
        color = random_rgb(rng)
        return texture(rng, size, color, near(rng, color, rng.randint(15, 110)))
    image = gradient(rng, size, random_rgb(rng), random_rgb(rng))
    if kind < 0.83:
        _draw_stripes(rng, image)
    elif level > 0.3:
        _draw_clutter(rng, image)
    return image


def gradient(rng: random.Random, size: tuple[int, int], first: RGB, last: RGB) -> Image.Image:
    """From one colour to the other, across, down or along the diagonal."""
    seed = Image.frombytes(
        "L", (2, 2), bytes(rng.choice(((0, 0, 255, 255), (0, 255, 0, 255), (0, 128, 128, 255))))
    )
    return _colored(seed.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5)), first, last)


def texture(rng: random.Random, size: tuple[int, int], first: RGB, last: RGB) -> Image.Image:
    """Soft random patches between two colours."""
    return _colored(patches(rng, size, fewest=4), first, last)


def patches(rng: random.Random, size: tuple[int, int], fewest: int) -> Image.Image:
    """Soft random grey, "L": at least so many patches across and down."""
    cells = rng.randint(fewest, 24), rng.randint(fewest, 24)
    # Pillow's effect_noise draws from the C library's own state, which no seed of ours reaches.
    seed = Image.frombytes("L", cells, rng.randbytes(cells[0] * cells[1]))
    return seed.resize(size, Image.Resampling.BILINEAR)


def near(rng: random.Random, color: RGB, spread: int) -> RGB:
    """A colour like `color`, each channel within `spread` of it."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in color)
    return red, green, blue


def photograph(image: Image.Image, rng: random.Random, level: float) -> Image.Image:
    """What lens, sensor and file format do to a picture; most pictures get one effect or none."""
    for effect, chance in ((_blurred, 0.08), (_noisy, 0.2), (_exposed, 0.2), (_compressed, 0.15)):
        if rng.random() < chance * (0.2 + 0.8 * level):
            image = effect(image, rng)
    return image


def _colored(shares: Image.Image, first: RGB, last: RGB) -> Image.Image:
    """0 becomes the first colour, 255 the last: a palette is less work than three channels."""
    palette = bytes(
        one + (other - one) * share // 255
        for share in range(256)
        for one, other in zip(first, last, strict=True)
    )
    shares.putpalette(palette)
    return shares.convert("RGB")


def _blurred(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.Kernel((3, 3), (1, 2, 1, 2, rng.randint(4, 16), 2, 1, 2, 1)))


def _noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    # Pillow's effect_noise draws from the C library's own state, which no seed of ours reaches.
    columns, rows = min(image.width, 160), min(image.height, 160)
    strength = rng.randint(5, 14)
    grain = Image.frombytes("L", (columns, rows), rng.randbytes(columns * rows))
    grain = grain.point([amount // strength for amount in range(256)]).resize(
        image.size, Image.Resampling.NEAREST
    )
    image.paste(rng.choice(((0, 0, 0), (128, 128, 128), (255, 255, 255))), (0, 0), grain)
    return image


def _exposed(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        return ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
    gain = rng.uniform(0.8, 1.0)
    offset = rng.uniform(0, 255 * (1 - gain))
    return image.point([round(gain * amount + offset) for amount in range(256)] * 3)


def _compressed(image: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.randint(60, 95))
    with Image.open(file) as decoded:
        return decoded.convert("RGB")


def _draw_stripes(rng: random.Random, image: Image.Image) -> None:
    draw, color = ImageDraw.Draw(image), random_rgb(rng)
    pitch = rng.randint(8, 60)
    if rng.random() < 0.5:
        for x in range(0, image.width, pitch):
            draw.rectangle((x, 0, x + pitch // 2, image.height), fill=color)
    else:
        for y in range(0, image.height, pitch):
            draw.rectangle((0, y, image.width, y + pitch // 2), fill=color)


def _draw_clutter(rng: random.Random, image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 16)):
        across, down = rng.randrange(image.width), rng.randrange(image.height)
        box = (
            across,
            down,
            across + rng.randint(5, image.width // 2),
            down + rng.randint(5, image.height // 2),
        )
        kind = rng.random()
        if kind < 0.5:
            draw.rectangle(box, fill=random_rgb(rng), outline=random_rgb(rng), width=rng.randint(0, 3))
        elif kind < 0.8:
            draw.ellipse(box, fill=random_rgb(rng))
        else:
            draw.line(box, fill=random_rgb(rng), width=rng.randint(1, 6))
