"""Price boards: the price asked for is the one printed beside the goods."""

import random

from PIL import Image

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.lettering import Board, Legibility
from deploy.demo_training.menus import MenuBoard, draw_menu


def test_goods_and_prices_of_a_row_are_level_and_inside_the_panel() -> None:
    rng, fonts = random.Random(0), FontShelf.find("held_out", [])
    for _ in range(20):
        menu = MenuBoard.compose(rng, fonts, Legibility.of((672, 448)), 3)
        board = Board(Image.new("RGB", (672, 448)), (336, 224))
        draw_menu(rng, board, menu)
        written = "".join(mark.label for mark in board.marks)
        rows = "".join(item + price for item, price in menu.items)
        assert written == (menu.title + rows).replace(" ", "")
        width, height = menu.room
        assert all(abs(mark.x - 0.5) * 672 < width / 2 for mark in board.marks)
        assert all(abs(mark.y - 0.5) * 448 < height / 2 for mark in board.marks)


def test_the_answer_is_the_price_of_the_goods_in_the_question() -> None:
    rng, fonts = random.Random(1), FontShelf.find("held_out", [])
    menu = MenuBoard.compose(rng, fonts, Legibility.of((448, 448)), 5)
    prices = {item.lower(): price for item, price in menu.items}
    for _ in range(50):
        turn = menu.turn(rng)
        named = [item for item in prices if item in turn.question.lower()]
        assert turn.task == "price" and turn.answer in [prices[item] for item in named]
    assert menu.title_turn(rng).answer == menu.title
