import pytest
import torch

from models.initialise import initialise
from models.longnet import LongNet
from models.token_order import along_hilbert, hilbert_index

SMALL = {
    "input_width": 12,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "feed_forward_width": 24,
    "segment_lengths": [8, 16],
    "dilated_ratios": [1, 2],
    "dropout": 0.25,
    "drop_path": 0.5,
    "compatible": False,
}
LENGTHS = [37, 5, 64]


def network(order: str) -> LongNet:
    made = LongNet(**SMALL, order=order)
    initialise(made, seed=3)
    return made


def square(side: int) -> torch.Tensor:
    return torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1).reshape(-1, 2)


def slides(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = [square(16)[torch.randperm(256, generator=generator)[:n].sort().values] for n in lengths]
    return torch.randn(sum(lengths), 12, generator=generator), torch.cat(cells)


def test_the_curve_visits_every_cell_of_a_square_once_and_steps_to_a_neighbour():
    cells = square(32)
    index = hilbert_index(cells)
    assert sorted(index.tolist()) == list(range(1024))
    steps = cells[index.argsort()].diff(dim=0).abs().sum(dim=1)
    assert (steps == 1).all()


def test_the_curve_of_four_cells_is_the_one_by_hand():
    assert hilbert_index(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]])).tolist() == [0, 3, 2, 1]


def test_the_farthest_cells_have_places_that_do_not_overflow():
    far = 2**20 - 1
    assert hilbert_index(torch.tensor([[far, far], [far, 0], [0, far]])).max() < 2**40


def test_slides_and_class_tokens_stay_where_they_are():
    _, cells = slides(LENGTHS)
    order = along_hilbert(cells, [n + 1 for n in LENGTHS])
    start = 0
    for n in LENGTHS:
        own = order[start : start + n + 1]
        assert own[0] == start and sorted(own.tolist()) == list(range(start, start + n + 1))
        start += n + 1


@pytest.mark.parametrize("drawn", [False, True])
def test_an_encoder_along_the_curve_is_the_row_wise_one_given_tiles_along_the_curve(drawn):
    tokens, cells = slides(LENGTHS)
    seeds = [5, 6, 7] if drawn else None
    along = torch.cat(
        [n + hilbert_index(part).argsort() for n, part in zip([0, 37, 42], cells.split(LENGTHS), strict=True)]
    )
    found = network("hilbert")(tokens, cells, LENGTHS, seeds, all_layers=True)
    by_hand = network("rows")(tokens[along], cells[along], LENGTHS, seeds, all_layers=True)
    torch.testing.assert_close(found.tiles[along], by_hand.tiles)
    for name in ("cls", "pooled", "cls_layers", "pooled_layers"):
        torch.testing.assert_close(getattr(found, name), getattr(by_hand, name))
    assert not torch.allclose(found.cls, network("rows")(tokens, cells, LENGTHS, seeds).cls)


def test_packed_slides_along_the_curve_equal_each_slide_alone():
    tokens, cells = slides(LENGTHS)
    encoder = network("hilbert")
    packed = encoder(tokens, cells, LENGTHS)
    alone = [encoder(t, c, [len(t)]) for t, c in zip(tokens.split(LENGTHS), cells.split(LENGTHS), strict=True)]
    torch.testing.assert_close(packed.tiles, torch.cat([one.tiles for one in alone]))
