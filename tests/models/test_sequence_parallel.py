"""Slides shared among processes: two gloo processes against one, forward and gradients."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.initialise import initialise
from models.longnet import LongNet
from models.sequence_parallel import TokenShare, check_sharing

LENGTHS = [5, 33, 1, 40]  # 83 tokens with their CLS: shares of 41 and 42, and the cut is inside the last slide
SETTINGS = {
    "input_width": 12, "width": 16, "depth": 2, "heads": 4, "feed_forward_width": 24, "segment_lengths": [8, 16, 32],
    "dilated_ratios": [1, 2, 4], "dropout": 0.25, "drop_path": 0.5,
}  # fmt: skip


KINDS = {"exact": {}, "compatible": {"compatible": True}, "hilbert": {"order": "hilbert"}}


def results(group: dist.ProcessGroup | None, kind: str) -> dict[str, torch.Tensor]:
    """All outputs, the gradient of the tiles and of every parameter, of a loss that sees all outputs; in float64."""
    network = LongNet(**{"compatible": False} | SETTINGS | KINDS[kind])
    initialise(network, seed=3)
    network.double()
    network.encoder.share_slides(group)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(sum(LENGTHS), 12, dtype=torch.float64, generator=generator).requires_grad_()
    cells = torch.randint(0, 50, (sum(LENGTHS), 2), generator=generator)
    found = network(tiles, cells, LENGTHS, [10, 11, 12, 13], all_layers=True)
    outputs = dict(zip(found._fields, found, strict=True))
    loss = sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in outputs.values())
    (loss / (1 if group is None else dist.get_world_size(group))).backward()
    gradients = {f"grad {name}": value.grad for name, value in network.named_parameters()} | {"grad tiles": tiles.grad}
    if group is not None:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=group)
    with torch.no_grad():  # the path in pieces
        outputs["without gradients"] = network(tiles, cells, LENGTHS).pooled
    return {name: value.detach() for name, value in (outputs | gradients).items()}


def worker(rank: int, folder: Path) -> None:
    os.environ.pop("MASTER_ADDR", None)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        for kind in KINDS:
            torch.save(results(dist.group.WORLD, kind), folder / f"{rank} {kind}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("shared slides")
    mp.spawn(worker, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_share_slides_equal_one_forward_and_gradients(folder: Path, kind: str) -> None:
    expected = results(None, kind)
    for rank in (0, 1):
        found = torch.load(folder / f"{rank} {kind}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-10, rtol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_shares_are_even_and_know_their_slides() -> None:
    whole = TokenShare(tuple(LENGTHS))
    assert whole.sizes == [79] and whole.tokens == slice(0, 79)
    assert whole.parts == [(number, slice(0, n)) for number, n in enumerate(LENGTHS)]


def test_heads_that_the_processes_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.sequence_parallel.processes_of", lambda group: 3)
    with pytest.raises(ValueError, match=r"16 heads can't be shared evenly by 3 processes.* among 1, 2, 4, 8, 16"):
        check_sharing(16, None)
    check_sharing(6, None)
