"""Font faces found on this machine, split by family into those trained on and those only tested on.

Knows families by the start of their file names; whatever is not listed here is never used.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from PIL import ImageFont

Split = Literal["training", "held_out"]

EMBEDDED = "Pillow"  # the family (an Aileron) that Pillow carries itself
# Never trained on; with them whatever has the same or nearly the same design (Carlito is Lato, Noto Sans and
# Droid Sans are Open Sans).
HELD_OUT_FAMILIES = {
    "Lato": ("lato-", "carlito"),
    "Open Sans": ("opensans", "notosans-", "notosansdisplay", "droidsans"),
    "Cabin": ("cabin",),
    "Vollkorn": ("vollkorn",),
    "Old Standard": ("oldstandard",),
    "JetBrains Mono": ("jetbrainsmono",),
    "Anonymous Pro": ("anonymouspro",),
}
TRAINING_FAMILIES = {
    # sans
    "Andika": ("andika",),
    "Averia Sans": ("averiasans",),
    "Cantarell": ("cantarell",),
    "DejaVu Sans": ("dejavusans-", "dejavusans.", "dejavusanscond"),
    "Dosis": ("dosis",),
    "Gillius": ("gilliusadf",),
    "Helvetica": ("liberationsans", "arimo", "nimbussans", "freesans", "texgyreheros", "arial", "helvetica"),
    "Inter": ("inter-",),
    "Junction": ("junction",),
    "Jura": ("jura",),
    "Karla": ("karla-",),
    "Klaudia": ("klaudia",),
    "Latin Modern Sans": ("lmsans10",),
    "Linux Biolinum": ("linbiolinum",),
    "Manrope": ("manrope",),
    "Neohellenic": ("gfsneohellenic",),
    "Okolaks": ("okolaks",),
    "Oxygen": ("oxygen-sans",),
    "PT Sans": ("pts", "ptn"),
    "Play": ("play-",),
    "Quicksand": ("quicksand",),
    "Roboto": ("roboto-", "robotocondensed"),
    "Sora": ("sora-",),
    "Tahoma": ("tahoma", "verdana"),
    "Trebuchet": ("trebuc",),
    "Tuffy": ("tuffy",),
    "URW Gothic": ("urwgothic", "texgyreadventor"),
    "Universalis": ("universalisadf",),
    # serif and slab
    "Accanthis": ("accanthisadf",),
    "Averia Serif": ("averiaserif",),
    "Berenika": ("berenika",),
    "Berenis": ("berenisadf",),
    "Bookman": ("urwbookman", "texgyrebonum"),
    "Caladea": ("caladea", "cambria"),
    "Century Schoolbook": ("c059", "texgyreschola"),
    "Charis": ("charissil",),
    "Courier Prime": ("courierprime",),
    "DejaVu Serif": ("dejavuserif",),
    "Didot": ("gfsdidot",),
    "Doulos": ("doulossil",),
    "EB Garamond": ("ebgaramond12",),
    "Fanwood": ("fanwood",),
    "Georgia": ("georgia",),
    "Goudy Bookletter": ("goudybookletter",),
    "Latin Modern Roman": ("lmroman10",),
    "Linux Libertine": ("linlibertiner",),
    "Noto Serif": ("notoserif-",),
    "PT Serif": ("ptf",),
    "Palatino": ("p052", "texgyrepagella"),
    "Prociono": ("prociono",),
    "Rasa": ("rasa-", "yrsa-"),
    "Roboto Slab": ("robotoslab",),
    "Times": ("liberationserif", "tinos", "nimbusroman", "freeserif", "texgyretermes", "times"),
    # mono
    "Courier": ("nimbusmono", "freemono", "texgyrecursor", "cour"),
    "Cousine": ("cousine", "liberationmono"),
    "DejaVu Sans Mono": ("dejavusansmono", "hack-"),
    "Fantasque": ("fantasquesansmono",),
    "Fira Code": ("firacode",),
    "Hermit": ("hermit",),
    "Inconsolata": ("inconsolata",),
    "Latin Modern Mono": ("lmmono10",),
    "League Mono": ("leaguemono-",),
    "Monofur": ("monof5",),
    "Mononoki": ("mononoki",),
    "OCR A": ("ocra.",),
    "PT Mono": ("ptm",),
    # display and hand
    "Comfortaa": ("comfortaa",),
    "Kaushan": ("kaushanscript",),
    "Leckerli": ("leckerlione",),
    "Lobster": ("lobster",),
}
# Weights and cuts that no sign is set in, small capitals (two letters look alike) and formula fonts.
UNWANTED = ("thin", "hairline", "extralight", "ultralight", "outline", "math", "caps", "symbol")
MIN_TRAINING_FAMILIES = 10
DEBIAN_PACKAGES = (
    "fonts-cantarell fonts-comfortaa fonts-courier-prime fonts-dejavu fonts-ebgaramond fonts-firacode "
    "fonts-inter fonts-karla fonts-liberation fonts-linuxlibertine fonts-lmodern fonts-quicksand fonts- "
    "roboto-unhinted fonts-roboto-slab fonts-texgyre fonts-urw-base35"
)
REFERENCE_PIXELS = 64  # size at which glyphs are measured
SUFFIXES = (".ttf", ".otf")
OPEN_SIZES = 6  # of one face; FreeType keeps a copy of the face for each


@dataclass(frozen=True)
class Glyph:
    """Extent of a character's ink from its origin on the baseline (y down), and its advance, in ems."""

    left: float
    top: float
    right: float
    bottom: float
    advance: float


class FontFace:
    """One face of a family, opened when first used. Travels to other processes without what it has opened."""

    def __init__(self, name: str, family: str, path: Path | None) -> None:
        self.name = name
        self.family = family
        self._path = path  # None is Pillow's own font
        self._fonts: OrderedDict[int, ImageFont.FreeTypeFont] = OrderedDict()
        self._glyphs: dict[str, Glyph] = {}

    def __reduce__(self) -> tuple[type[FontFace], tuple[str, str, Path | None]]:
        return FontFace, (self.name, self.family, self._path)

    def at(self, pixels: int) -> ImageFont.FreeTypeFont:
        """The face with an em of that many pixels; raises OSError for a file that is no font."""
        font = self._fonts.pop(pixels, None)
        if font is None:
            font = self._open(pixels)
            if len(self._fonts) >= OPEN_SIZES:
                self._fonts.popitem(last=False)
        self._fonts[pixels] = font
        return font

    def glyph(self, character: str) -> Glyph:
        measured = self._glyphs.get(character)
        if measured is None:
            measured = self._glyphs[character] = self._measure(character)
        return measured

    def width(self, text: str) -> float:
        """Sum of the advances, in ems; kerning is left out."""
        return sum([self.glyph(character).advance for character in text])

    @property
    def cap_height(self) -> float:
        """Height of a capital letter, in ems."""
        return -self.glyph("H").top

    def is_complete(self) -> bool:
        """Whether it has every printable ASCII character and tells lower case from upper."""
        try:
            font = self.at(24)
            missing = {bytes(font.getmask(gap)) for gap in ("\uffff", "\u0378")}
            masks = [bytes(font.getmask(chr(code))) for code in range(33, 127)]
        except (OSError, ValueError):
            return False
        lower, upper = (bytes(font.getmask(letters)) for letters in ("ae", "AE"))
        return missing.isdisjoint(masks) and all(map(any, masks)) and lower != upper

    def _open(self, pixels: int) -> ImageFont.FreeTypeFont:
        if self._path is not None:
            return ImageFont.truetype(self._path, pixels, layout_engine=ImageFont.Layout.BASIC)
        font = ImageFont.load_default(pixels)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font

    def _measure(self, character: str) -> Glyph:
        font = self.at(REFERENCE_PIXELS)
        advance = font.getlength(character)
        # Not getbbox: that reaches from the origin to the advance.
        mask, (right, down) = font.getmask2(character, "L", anchor="ls")
        left, top, far, low = mask.getbbox() or (0, 0, math.ceil(advance), 0)
        edges = left + right, top + down, far + right, low + down
        return Glyph(*(edge / REFERENCE_PIXELS for edge in (*edges, advance)))


class FontShelf:
    """The faces of one split, by family; every family is as likely as any other."""

    def __init__(self, faces: Iterable[FontFace]) -> None:
        families: dict[str, list[FontFace]] = {}
        for face in faces:
            families.setdefault(face.family, []).append(face)
        assert families, "a shelf holds at least one face"
        self._families = tuple(tuple(families[family]) for family in sorted(families))

    @classmethod
    def find(cls, split: Split, folders: Sequence[Path] | None = None) -> FontShelf:
        """All usable faces of that split in the usual font folders and in `folders`.

        Deterministic for the same files. `held_out` always has Pillow's own font; ValueError when `training`
        finds too few families.
        """
        families = TRAINING_FAMILIES if split == "training" else HELD_OUT_FAMILIES
        faces = [] if split == "training" else [FontFace(EMBEDDED, EMBEDDED, None)]
        for path in _font_files((*(folders or ()), *_usual_folders())):
            family = _family(path, families)
            face = FontFace(path.name, family or "", path)
            if family is not None and face.is_complete():
                faces.append(FontFace(path.name, family, path))
        num_families = len({face.family for face in faces})
        if split == "training" and num_families < MIN_TRAINING_FAMILIES:
            raise ValueError(
                f"found {num_families} font families to train on, need {MIN_TRAINING_FAMILIES}; "
                f"on Debian or Ubuntu: apt-get install {DEBIAN_PACKAGES}"
            )
        return cls(faces)

    @property
    def faces(self) -> tuple[FontFace, ...]:
        return tuple(face for family in self._families for face in family)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(family[0].family for family in self._families)

    def choose(self, rng: Random) -> FontFace:
        return rng.choice(rng.choice(self._families))


def quantized(pixels: float) -> int:
    """The size at or below `pixels` that faces are opened at: steps of about 8 %, so that few sizes occur."""
    size = 6
    while size * 27 // 25 + 1 <= pixels:
        size = size * 27 // 25 + 1
    return size


def _usual_folders() -> tuple[Path, ...]:
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")
    return (
        home / ".local/share/fonts",
        home / ".fonts",
        Path("/usr/local/share/fonts"),
        Path("/usr/share/fonts"),
    )


def _font_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Font files in the order of their names; of files with the same name only the first folder's."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                found.setdefault(path.name, path)
    return (found[name] for name in sorted(found))


def _family(path: Path, families: dict[str, tuple[str, ...]]) -> str | None:
    name = "".join(path.name.lower().replace("_", "").split())
    if any(word in name for word in UNWANTED):
        return None
    matches = (family for family, prefixes in families.items() if name.startswith(prefixes))
    return next(matches, None)
