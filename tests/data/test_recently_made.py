"""What is kept for whoever asks again."""

import pickle

from data.recently_made import RecentlyMade


class Counting:
    def __init__(self) -> None:
        self.made: list[int] = []
        self.kept = RecentlyMade(self.square, 2)

    def square(self, key: int) -> int:
        self.made.append(key)
        return key * key


def test_only_the_last_few_are_kept_and_one_that_was_dropped_is_made_again() -> None:
    counting = Counting()
    assert [counting.kept.get(key) for key in (3, 4, 3, 5, 4)] == [9, 16, 9, 25, 16]
    assert counting.made == [3, 4, 5] and len(counting.kept) == 2 and 3 not in counting.kept
    counting.kept.drop(4)
    assert counting.kept.get(4) == 16 and counting.made == [3, 4, 5, 4]


def test_a_copy_for_another_process_makes_its_own() -> None:
    counting = Counting()
    counting.kept.get(3)
    copy = pickle.loads(pickle.dumps(counting))
    assert len(copy.kept) == 0 and copy.kept.capacity == 2
    assert copy.kept.get(3) == 9 and copy.made == [3, 3] and counting.made == [3]
