"""Lines of text on a picture: where their characters lie and how small they may be."""

import pytest
from PIL import Image

from deploy.demo_training.fonts import EMBEDDED, FontFace
from deploy.demo_training.lettering import Board, Legibility, TextBlock, fitting_em, tile_grid

SOLID_MIDDLES = "HX+-.XES8:X"  # each has ink close to the middle of its box, all but the colon
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.fixture
def face() -> FontFace:
    return FontFace(EMBEDDED, EMBEDDED, None)


def darkest_near(image: Image.Image, x: float, y: float, reach: float) -> int:
    box = (round(x - reach), round(y - reach), round(x + reach) + 1, round(y + reach) + 1)
    return min(image.convert("L").crop(box).tobytes())


@pytest.mark.parametrize("degrees", [0.0, 10.0, -7.5])
@pytest.mark.parametrize("align", ["left", "center", "right"])
def test_every_mark_lies_on_the_ink_of_its_character(face: FontFace, degrees: float, align: str) -> None:
    image = Image.new("RGB", (640, 300), WHITE)
    board = Board(image, (320, 150), degrees)
    text = SOLID_MIDDLES.replace(":", "")
    board.write(text, face, 50, (10, 12), BLACK, align)  # type: ignore[arg-type]
    inside = [mark for mark in board.marks if 0.02 < mark.x < 0.98]
    assert "".join(mark.label for mark in board.marks) == text and len(inside) >= 5
    for mark in inside:
        assert darkest_near(image, mark.x * 640, mark.y * 300, 3) < 100, mark


def test_spaces_have_no_marks_and_marks_follow_the_text(face: FontFace) -> None:
    board = Board(Image.new("RGB", (300, 100), WHITE), (150, 50))
    board.write("AB C", face, 30, (0, 0), BLACK)
    assert [mark.label for mark in board.marks] == ["A", "B", "C"]
    first, second, third = (mark.x for mark in board.marks)
    assert third - second > second - first > 0


def test_turning_counterclockwise_lifts_the_right_end(face: FontFace) -> None:
    board = Board(Image.new("RGB", (300, 200), WHITE), (150, 100), 10)
    board.write("HHHHH", face, 30, (0, 0), BLACK)
    assert board.marks[-1].y < board.marks[0].y


def test_text_keeps_inside_the_box_it_claims(face: FontFace) -> None:
    image = Image.new("RGB", (400, 300), WHITE)
    block = TextBlock(("HOTEL", "EXIT 24"), face, 40)
    block.write(Board(image, (200, 150)), (0, 0), BLACK)
    ink = image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    assert ink is not None
    assert ink == pytest.approx(
        (
            200 - block.width / 2,
            150 - block.height / 2,
            200 + block.width / 2,
            150 + block.height / 2,
        ),
        abs=5,
    )


@pytest.mark.parametrize("degrees", [0.0, 8.0])
def test_a_panel_covers_its_middle_and_not_its_rounded_corners(degrees: float) -> None:
    image = Image.new("RGB", (200, 200), WHITE)
    board = Board(image, (100, 100), degrees)
    board.panel((-60, -40, 60, 40), BLACK, 30)
    assert image.getpixel((100, 100)) == BLACK
    for corner in ((-58, -38), (58, -38), (58, 38), (-58, 38)):
        x, y = board.at(*corner)
        assert image.getpixel((round(x), round(y))) == WHITE
    for edge in ((-58, 0), (58, 0), (0, 38), (0, -38)):
        x, y = board.at(*edge)
        assert image.getpixel((round(x), round(y))) == BLACK


def test_the_largest_em_that_fits_does_fit_and_is_close(face: FontFace) -> None:
    em = fitting_em(face, ("BAKERY", "OPEN"), (200, 500))
    assert 0.85 * 200 <= face.width("BAKERY") * em <= 200
    assert TextBlock(("BAKERY", "OPEN"), face, fitting_em(face, ("BAKERY", "OPEN"), (900, 60))).height <= 60


def test_the_grid_is_the_models() -> None:
    assert tile_grid((256, 256)) == (1, 1)
    assert tile_grid((672, 448)) == (3, 2)
    assert tile_grid((448, 672)) == (2, 3)


@pytest.mark.parametrize(("size", "fine"), [((256, 256), False), ((672, 448), False), ((672, 448), True)])
def test_legible_text_has_its_pixels_in_front_of_the_model(
    face: FontFace, size: tuple[int, int], fine: bool
) -> None:
    columns, rows = tile_grid(size) if fine else (1, 1)
    em = Legibility.of(size, fine).em(face, "Till")
    cap = face.cap_height * em * rows * 224 / size[1]
    advance = face.width("Till") / 4 * em * columns * 224 / size[0]
    assert cap >= (9 if fine else 10) and advance >= (5.5 if fine else 7)
    assert min(cap / (9 if fine else 10), advance / (5.5 if fine else 7)) < 1.2
