"""Copies of a checkpoint's tensors: of this moment, whatever is done to the tensors later, and whatever they are."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import StagingOptions

from pretrain.run.saving import Copies


def copies() -> Copies:
    return Copies(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )


def test_tensors_in_dictionaries_lists_and_tuples_are_copied_each_time_into_the_same_memory() -> None:
    tensors = [torch.zeros(2) for _ in range(3)]
    given: dict[str, Any] = {"a": {"b": tensors[0], "n": 3}, "c": [tensors[1]], "d": ("name", [tensors[2]])}
    stager, places = copies(), []
    for moment in range(3):
        for tensor in tensors:
            tensor.fill_(moment)
        staged = stager.stage(given)
        for tensor in tensors:
            tensor.fill_(-1)
        assert (staged["a"]["n"], staged["d"][0], type(staged["d"])) == (3, "name", tuple)
        found: list[Tensor] = [staged["a"]["b"], staged["c"][0], staged["d"][1][0]]
        assert [one.tolist() for one in found] == [[moment, moment]] * 3
        places.append([one.data_ptr() for one in found])
    assert places[1] == places[2]


def test_copies_are_made_anew_where_a_shape_or_a_kind_of_number_is_another() -> None:
    stager = copies()
    for tensor in (torch.zeros(4), torch.full((1,), 7.0), torch.full((1,), 1e-9, dtype=torch.float64), torch.ones(1)):
        staged = stager.stage({"w": tensor})["w"]
        assert (staged.shape, staged.dtype) == (tensor.shape, tensor.dtype) and staged.equal(tensor)
