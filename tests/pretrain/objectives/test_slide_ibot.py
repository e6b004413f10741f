"""Slide iBOT: means over the global batch however it is divided, what judges it, and what it is made of."""

import numpy as np
import pytest
import torch

from data.embeddings.grid_crops import CropSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_vit import SlideViT
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_ibot import SlideIBOT, matched
from pretrain.settings.composition import load
from pretrain.training.even_shares import require_even
from tests.data.embeddings.test_slide_sequences import DEFAULTS, make_store
from tests.pretrain.objectives.tile_objectives import filled
from tests.pretrain.training.sharded_steps import CROPS, SLIDE_IBOT

MOMENT = Moment(3, 10, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("store"), 12)


def sequences(store: EmbeddingStore, **changes: object) -> CropSequences:
    return CropSequences(store, Statistics.of(store), **(DEFAULTS | CROPS | {"shift_grid": 8} | changes))  # type: ignore[arg-type]


def vit() -> SlideViT:
    return SlideViT(
        3, width=16, depth=2, heads=2, feed_forward_width=16, registers=1, slopes="fixed", reach=None, dropout=0.1, drop_path=0.1
    )  # fmt: skip


def ibot(**changes: object) -> SlideIBOT:
    settings = SLIDE_IBOT | {"spread_weight": 0.0, "frozen_prototype_norms": True} | changes
    built = filled(SlideIBOT(vit, **settings))  # type: ignore[arg-type]
    built.dino_centre.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
    return built  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes", [{}, {"centring": "sinkhorn", "separate_ibot_head": True, "ibot_prototypes": 9, "ibot_bottleneck": 4}]
)
def test_micro_batches_with_other_numbers_of_slides_add_up_to_the_whole(store, changes):
    found = sequences(store, empty_cells=True)
    whole, uneven = [found.held_out([0, 1, 2])], [found.held_out([0]), found.held_out([1, 2])]
    gradients, losses = [], []
    for parts in (whole, uneven):
        model = ibot(**changes)
        given = [model.loss(part, MOMENT)[0] / len(parts) for part in model.prepare(parts, MOMENT)]
        sum(given).backward()
        losses.append(sum(given).item())
        gradients.append({name: p.grad for name, p in model.student.named_parameters() if p.grad is not None})
        model.after_step(MOMENT)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_crops_of_one_slide_that_lie_together_are_matched_and_in_collapse_chance_is_left():
    near = torch.eye(6)[:, None] + 0.1 * torch.randn(6, 3, 6, generator=torch.Generator().manual_seed(0))
    assert matched(near) == 1.0
    assert matched(torch.ones(6, 2, 4)) == pytest.approx(1 / 6)
    swapped = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)], 1)
    assert matched(swapped) == 0.0
    assert np.isnan(matched(swapped[:1]))  # of one slide, nothing is told


def test_held_out_slides_are_judged_alike_together_and_alone(store):
    found, model = sequences(store, empty_cells=True), ibot()
    with torch.no_grad():
        together = model.judged(found.held_out([0, 1, 2]))
        alone = [model.judged(found.held_out([k])) for k in (0, 1, 2)]
    for name, rows in together.items():
        torch.testing.assert_close(rows, torch.cat([one[name] for one in alone]), atol=1e-5, rtol=0)
    figures = model.evaluate({name: rows.double() for name, rows in together.items()})
    # An embedding is (slide, column, row): where a crop lies says more than whose it is.
    assert 0 <= figures["matched_means"] <= 1 and 0 < figures["masked_agreement"] < 1
    batch = found.held_out([0])
    crop = batch.targets()[: batch.lengths[0]][batch.valid[: batch.lengths[0]]]
    torch.testing.assert_close(together["means"][0, 0], crop.mean(0), atol=1e-5, rtol=0)
    assert together["masked"][:, 1].sum() == sum(found.held_out([0, 1, 2]).masked_lengths)


def test_a_longnet_hides_masked_tiles_and_takes_no_empty_cells():
    network = LongNet(
        3, width=16, depth=1, heads=2, feed_forward_width=16, segment_lengths=[16], dilated_ratios=[1], dropout=0.0,
        drop_path=0.0, compatible=False,
    )  # fmt: skip
    assert "mask_token" not in network.state_dict()
    network.add_mask_token()
    initialise(network, 0)
    tokens, cells = torch.randn(6, 3), torch.stack([torch.arange(6), torch.arange(6)], 1)
    masked = torch.arange(6) < 2
    found = network(tokens, cells, [6], masked=masked).tiles
    other = tokens.clone()
    other[:2] = 7.0
    assert torch.equal(network(other, cells, [6], masked=masked).tiles, found)
    assert not torch.equal(network(tokens, cells, [6]).tiles, found)
    found.square()[:, 0].sum().backward()
    assert network.mask_token.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="tiles alone"):
        network(tokens, cells, [6], valid=~masked)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["objective.group_size=5"], "group_size=5 doesn't divide the 8 slides"),
        (["data.batch_tokens=9000"], "set data.batch_tokens=null"),
    ],
)
def test_groups_that_a_step_does_not_hold_whole_are_refused(words, says):
    given = [
        "objective=slide_ibot",
        "data.field_cells=0",
        "objective.spread_weight=0.1",
        "run=r",
        "data.embeddings=e",
        *words,
    ]
    with pytest.raises(Fault, match=says):
        require_even(load("slide", given).object(), 1)
