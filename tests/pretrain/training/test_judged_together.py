"""Held-out slides are judged once each, by any number of ranks."""

import pytest
import torch

from data.fault import Fault
from pretrain.training import judged_together
from pretrain.training.judged_together import own_passes, rows_of_all


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_batch_counts_on_one_rank_and_all_ranks_make_as_many_passes(ranks: int) -> None:
    batches = [[0, 1], [2], [3, 4], [5], [6]]
    shares = [own_passes(batches, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(numbers for share in shares for numbers, counts in share if counts) == batches


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_of_all_are_the_same_on_any_number_of_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(9, 3, dtype=torch.float64)
    numbers, batches = [1, 2, 4, 7, 8], [[1, 2], [4], [7, 8]]
    sums: dict[int, list[torch.Tensor]] = {}

    def noted(table: torch.Tensor) -> torch.Tensor:
        """What a rank gives to the sum over ranks, in the order of its tables."""
        sums.setdefault(rank, []).append(table)
        return table

    monkeypatch.setattr(judged_together, "total", noted)
    for rank in range(ranks):
        passes = own_passes(batches, rank, ranks)
        rows_of_all(passes, lambda some: {"v": values[some], "n": values[some, 0]}, numbers, torch.device("cpu"))
    for i, expected in enumerate((values[numbers, 0], values[numbers])):  # by name, whatever the order they came in
        assert torch.equal(torch.stack([tables[i] for tables in sums.values()]).sum(0), expected)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"e": torch.ones(1)}, "late is rows of shape () in one batch and nothing in another"),
        (
            {"e": torch.ones(1), "late": torch.ones(1, 2)},
            "late is rows of shape () in one batch and rows of shape (2,)",
        ),
    ],
)
def test_rows_that_differ_between_batches_are_refused(second: dict[str, torch.Tensor], sentence: str) -> None:
    given = iter([{"late": torch.ones(1), "e": torch.ones(1)}, second])
    with pytest.raises(Fault) as refused:
        rows_of_all([([0], True), ([1], True)], lambda _: next(given), [0, 1], torch.device("cpu"))
    assert sentence in str(refused.value)
