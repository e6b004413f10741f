"""Distillation: a student comes to see on real tiles what a frozen teacher of another width and patch size sees."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.fault import Fault
from pretrain.objectives.contract import require_trainable
from pretrain.objectives.distil import Distil
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.regression import cosine_distance, normed_smooth_l1
from pretrain.objectives.tile_batch import TileBatch
from pretrain.probing.images import read_image
from pretrain.run import checkpoints
from pretrain.training.gradients import gradients
from tests.pretrain.objectives.tile_objectives import (
    GLOBAL,
    PATCH,
    batch,
    distil,
    encoder,
    teacher_file,
    unfilled_distil,
)

SIDE = 32  # pixels of a real tile's crop


def crops_of(files: list[Path]) -> Tensor:
    """The middles of tiles, at an eighth of their size."""
    images = torch.stack([torch.tensor(read_image(file)[:224, :224]) for file in files]).permute(0, 3, 1, 2) / 255
    return F.interpolate(images, (SIDE, SIDE), mode="area") * 4 - 2


def as_batch(images: Tensor) -> TileBatch:
    grid = SIDE // PATCH
    return TileBatch([(images, 1)], torch.zeros(len(images), grid, grid, dtype=torch.bool))


@torch.no_grad()
def unexplained(model: Distil, images: Tensor) -> tuple[float, float]:
    """Of class tokens and of patches, the share of the given teacher's variance over tiles that the student's moving
    average doesn't tell, directions alone; 1 is what the mean would tell."""
    seen = as_batch(images)
    classes, patches = model.taught(seen)
    (tokens,) = model.teacher["encoder"]([images])
    pairs = [
        (model.class_projector(tokens.cls), classes[0]),
        (model.patch_projector(tokens.patches).flatten(0, 1), patches.flatten(0, 1)),
    ]
    found = []
    for ours, theirs in pairs:
        one, other = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        found.append(float((one - other).square().sum() / (other - other.mean(0)).square().sum()))
    return found[0], found[1]


def test_a_student_learns_a_random_teachers_features_of_real_tiles_beyond_their_mean(shared: Path) -> None:
    files = sorted((shared / "tiles" / "crc5").rglob("*.jpg"))[::12]
    if not files:
        pytest.skip("no real tiles")
    images, apart = crops_of(files[:96]), crops_of(files[96:126])
    settings = {"teacher": teacher_file(24, 8), "teacher_momentum": 0.9, "teacher_momentum_final": 0.9}
    model = distil(make_encoder=encoder(width=32, image_size=SIDE), **settings)
    before = unexplained(model, apart)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(100):
        some = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:32]]
        optimiser.zero_grad()
        gradients(model, [(as_batch(some), 0)], Moment(step, 100, 0), lambda loss: loss.backward())
        optimiser.step()
        model.after_step(Moment(step, 100, 0))
    after = unexplained(model, apart)
    assert min(before) > 2 and after[0] < 0.6 and after[1] < 0.6, (before, after)


def test_the_given_teacher_sees_global_crops_alone_at_the_students_grid_of_patches() -> None:
    model, seen = distil(), batch(3)
    sizes = []
    model.given.register_forward_pre_hook(lambda _, inputs: sizes.append([tuple(x.shape) for x in inputs[0]]))
    classes, patches = model.taught(seen)
    grid = GLOBAL // PATCH
    assert sizes == [[(6, 3, 6 * grid, 6 * grid)]]
    assert classes.shape == (2, 3, 24) and patches.shape == (6, grid * grid, 24)
    assert not model.given.training and not model.train().given.training
    loss, _ = model.loss(seen, Moment(0, 10, 0))
    loss.backward()
    assert all(p.grad is None for network in model.frozen().values() for p in network.parameters())
    assert all(
        p.grad is not None for network in model.trained().values() for p in network.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("left_out", ["class_weight", "patch_weight"])
def test_a_term_without_weight_has_no_projection_and_the_other_is_learned(left_out: str) -> None:
    model, moment = distil(**{left_out: 0.0}), Moment(0, 10, 0)
    require_trainable(model)
    model.loss(batch(2), moment)[0].backward()
    trained = model.trained()
    assert len(trained) == 2 and f"{left_out.removesuffix('_weight')}_projector" not in trained
    assert all(p.grad is not None for network in trained.values() for p in network.parameters() if p.requires_grad)


def test_terms_are_means_over_tiles_of_the_same_view_and_of_local_views_with_all_global_ones() -> None:
    model, seen = distil(local_weight=0.5, class_weight=2.0, patch_weight=3.0), batch(2)
    loss, figures = model.loss(seen, Moment(0, 10, 0))
    classes, patches = model.taught(seen)
    tokens = model.encoder([crops for crops, _ in seen.crops])
    large, small = (model.class_projector(part.cls).unflatten(0, (-1, 2)) for part in tokens)
    of_global = [1 - F.cosine_similarity(large[v, i], classes[v, i], dim=0) for v in range(2) for i in range(2)]
    of_local = [
        1 - F.cosine_similarity(small[s, i], classes[v, i], dim=0)
        for s in range(3) for v in range(2) for i in range(2)
    ]  # fmt: skip
    of_patches = 1 - F.cosine_similarity(model.patch_projector(tokens[0].patches), patches, dim=-1)
    torch.testing.assert_close(figures["class_global"], torch.stack(of_global).mean())
    torch.testing.assert_close(figures["class_local"], torch.stack(of_local).mean())
    torch.testing.assert_close(figures["patches"], of_patches.mean())
    expected = 2 * (figures["class_global"] + 0.5 * figures["class_local"]) + 3 * figures["patches"]
    torch.testing.assert_close(loss, expected)


def test_distances_are_what_they_say() -> None:
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert float(cosine_distance(student, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))) == pytest.approx(0.5)
    # (2, 4) normed is (−1, 1): differences 2 and −1, of which smooth L1 is 1.5 and 0.5.
    assert float(normed_smooth_l1(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]]))) == pytest.approx(1, abs=1e-4)


def test_checkpoints_hold_the_students_networks_and_not_the_given_teachers() -> None:
    model = distil()
    state = model.state_dict()
    assert {name.partition(".")[0] for name in state} == {"encoder", "teacher", "class_projector", "patch_projector"}
    model.load_state_dict(state)
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    optimiser = torch.optim.AdamW(model.encoder.parameters())
    assert checkpoints.size(model, optimiser) == held + checkpoints.AROUND * len(state)
    with pytest.raises(RuntimeError, match=r"encoder\.cls_token"):
        model.load_state_dict({name: value for name, value in state.items() if name != "encoder.cls_token"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher": None}, "objective.teacher= names nothing: give the encoder to be learned from"),
        ({"teacher_heads": None}, "how many heads attention has.*give objective.teacher_heads="),
        ({"teacher": "nowhere/run"}, "there is no folder nowhere/run"),
        ({"teacher_heads": 5}, "not divisible by heads 5: give its own number of heads, objective.teacher_heads="),
    ],
)
def test_a_teacher_that_can_not_be_had_is_one_sentence(settings: dict[str, object], says: str) -> None:
    with pytest.raises(Fault, match=says):
        unfilled_distil(encoder(), **settings)


def test_a_teacher_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weights = load_file(teacher_file())
    weights["norm.bias"][0] = torch.nan
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(Fault, match=r"objective\.teacher=.*broken\.safetensors is not usable: norm\.bias"):
        unfilled_distil(encoder(), teacher=str(tmp_path / "broken.safetensors"))
