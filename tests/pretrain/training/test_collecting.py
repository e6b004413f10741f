"""Garbage is collected on purpose."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.training.collecting import EVERY, CollectGarbage, collecting_by_itself, forget_forwards
from pretrain.training.sharding import lay_mesh, shard
from tests.pretrain.objectives.tile_objectives import encoder, unfilled_dinov2
from tests.pretrain.training.real_steps import one_process


def test_a_run_collects_after_the_same_steps_and_by_itself_only_in_looks_and_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collections: list[int] = []
    training: Any = SimpleNamespace(step=0, looks_now=False, is_due=False, objective=unfilled_dinov2(encoder()))
    monkeypatch.setattr(gc, "collect", lambda: collections.append(training.step))
    callback, trainer = CollectGarbage(), None
    with collecting_by_itself():
        for step in range(2 * EVERY):
            callback.on_train_batch_start()
            assert not gc.isenabled()
            training.step, training.looks_now = step + 1, step == 3
            callback.on_train_batch_end(trainer, training)
            assert gc.isenabled() == training.looks_now
        assert gc.get_freeze_count() > 0
    assert collections == [EVERY, 2 * EVERY]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_is_noted_of_a_teachers_forwards_is_let_go() -> None:
    with one_process():
        with torch.device("meta"):
            objective = unfilled_dinov2(encoder())
        shard(objective, lay_mesh("cpu", 1, 1), "float32")
        objective.to_empty(device="cpu")
        for tensor in objective.parameters():
            nn.init.zeros_(tensor)
        images = torch.zeros(2, 3, 16, 16)

        def seen() -> torch.Tensor:
            with torch.no_grad():
                return objective.teacher.encoder([images])[0].cls

        first = seen()
        notes = objective.teacher.encoder._get_fsdp_state()._comm_ctx.post_forward_order  # type: ignore[operator]
        assert len(notes) == 3  # two blocks and the network
        seen()
        assert len(notes) == 6
        forget_forwards(objective)
        assert not notes
        torch.testing.assert_close(seen(), first)
