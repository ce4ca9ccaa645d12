"""Which fonts are trained on and which are only tested on."""

import copy
import random
import shutil
from pathlib import Path

import pytest

from deploy.demo_training.fonts import (
    EMBEDDED,
    HELD_OUT_FAMILIES,
    TRAINING_FAMILIES,
    FontFace,
    FontShelf,
    quantized,
)


@pytest.fixture
def embedded() -> FontFace:
    return FontFace(EMBEDDED, EMBEDDED, None)


def test_pillows_own_font_is_always_held_out(tmp_path: Path) -> None:
    shelf = FontShelf.find("held_out", [tmp_path])
    assert EMBEDDED in shelf.families
    assert EMBEDDED not in TRAINING_FAMILIES


def test_no_file_name_belongs_to_both_splits() -> None:
    held_out = [prefix for prefixes in HELD_OUT_FAMILIES.values() for prefix in prefixes]
    training = [prefix for prefixes in TRAINING_FAMILIES.values() for prefix in prefixes]
    clashes = [(a, b) for a in held_out for b in training if a.startswith(b) or b.startswith(a)]
    assert clashes == []


def test_training_without_fonts_names_the_packages_to_install(tmp_path: Path) -> None:
    try:
        families = FontShelf.find("training", [tmp_path]).families
    except ValueError as error:
        assert "fonts-liberation" in str(error)
    else:
        assert len(families) >= 10 and set(families) <= set(TRAINING_FAMILIES)


def test_a_file_that_is_no_font_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "Lato-Regular.ttf").write_bytes(b"no font at all")
    shelf = FontShelf.find("held_out", [tmp_path])
    assert "Lato-Regular.ttf" not in [face.name for face in shelf.faces]
    assert not FontFace("Lato-Regular.ttf", "Lato", tmp_path / "Lato-Regular.ttf").is_complete()


def test_families_are_found_by_file_name_and_the_given_folder_wins(tmp_path: Path, a_font_file: Path) -> None:
    shutil.copy(a_font_file, tmp_path / "Vollkorn-Regular.ttf")
    shutil.copy(a_font_file, tmp_path / "Unknown-Regular.ttf")
    shelf = FontShelf.find("held_out", [tmp_path])
    assert "Vollkorn" in shelf.families
    assert "Unknown-Regular.ttf" not in [face.name for face in shelf.faces]


def test_the_same_seed_chooses_the_same_faces(tmp_path: Path) -> None:
    shelves = [FontShelf.find("held_out", [tmp_path]) for _ in range(2)]
    rngs = [random.Random(3) for _ in shelves]
    first, second = (
        [shelf.choose(rng).name for _ in range(20)] for shelf, rng in zip(shelves, rngs, strict=True)
    )
    assert first == second


def test_a_used_face_travels_to_another_process(embedded: FontFace) -> None:
    width = embedded.width("Tessera") * 40
    embedded.at(40)
    there = copy.copy(embedded)  # made anew from what travels, as in the other process
    assert there.at(40).getlength("Tessera") == pytest.approx(width, rel=0.05)


def test_widths_in_ems_are_those_of_the_opened_font(embedded: FontFace) -> None:
    assert embedded.width("HOTEL 24") * 50 == pytest.approx(embedded.at(50).getlength("HOTEL 24"), rel=0.05)
    top, bottom = (embedded.at(100).getbbox("H", anchor="ls")[edge] for edge in (1, 3))
    assert embedded.cap_height * 100 == pytest.approx(bottom - top, abs=2)


def test_only_a_few_sizes_of_a_face_stay_open(embedded: FontFace) -> None:
    first = embedded.at(10)
    assert embedded.at(10) is first
    for pixels in range(11, 30):
        embedded.at(pixels)
    assert embedded.at(10) is not first


def test_quantized_sizes_never_exceed_what_was_asked_and_come_close() -> None:
    for pixels in range(6, 400):
        assert pixels * 0.86 <= quantized(pixels) <= pixels
    assert len({quantized(pixels) for pixels in range(6, 400)}) < 50


@pytest.fixture
def a_font_file(tmp_path: Path) -> Path:
    """Pillow's own font as a file."""
    font = FontFace(EMBEDDED, EMBEDDED, None).at(20)
    path = tmp_path / "source" / "embedded.bin"
    path.parent.mkdir()
    path.write_bytes(font.font_bytes)
    return path
