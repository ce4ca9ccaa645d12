"""Small integer tensors of a step in one copy."""

import torch

from llm_service.attention.packed_numbers import ALIGNMENT, PackedNumbers

CPU = torch.device("cpu")


def test_sections_come_back_in_order_with_their_shapes():
    numbers = PackedNumbers()
    numbers.add([3, 1, 2])
    numbers.add([1, 2, 3, 4], 2, 2)
    numbers.add_rows([[5], [6, 7, 8], [9, 10]])
    vector, square, table = numbers.to(CPU)
    assert vector.tolist() == [3, 1, 2]
    assert square.tolist() == [[1, 2], [3, 4]]
    assert table.tolist() == [[5, 0, 0], [6, 7, 8], [9, 10, 0]]
    assert vector.dtype == table.dtype == torch.int32


def test_sections_start_aligned():
    numbers = PackedNumbers()
    for count in (1, ALIGNMENT, 5):
        numbers.add([7] * count)
    assert [section.storage_offset() % ALIGNMENT for section in numbers.to(CPU)] == [0, 0, 0]


def test_nothing_is_sent_for_a_step_without_sections():
    assert PackedNumbers().to(CPU) == []


def test_sections_without_numbers_stay_empty():
    numbers = PackedNumbers()
    numbers.add([])
    assert [section.tolist() for section in numbers.to(CPU)] == [[]]
    numbers.add([4])
    assert [section.tolist() for section in numbers.to(CPU)] == [[], [4]]
