"""One numbering over parts that count their own."""

import numpy as np

from data.tiles.numbering import Numbering


def test_every_number_is_of_one_part_and_parts_without_items_have_none() -> None:
    counts = [3, 0, 1, 4, 0]
    expected = [(part, own) for part, count in enumerate(counts) for own in range(count)]
    numbering = Numbering(counts)
    assert [numbering.locate(number) for number in range(8)] == expected
    assert [numbering.number(part, own) for part, own in expected] == list(range(8))


def test_numbers_are_sorted_out_by_their_parts_in_their_order() -> None:
    found = {part: own.tolist() for part, own in Numbering([3, 0, 1, 4]).sort_out(np.array([7, 0, 4, 2, 0]))}
    assert found == {0: [0, 2, 0], 3: [3, 0]}
