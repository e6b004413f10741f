"""Functions that a compiling run fuses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.fused import fusible, fusing


def test_a_function_is_compiled_once_and_only_while_fusing() -> None:
    made: list[str] = []

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        made.append(function.__name__)
        return lambda *arguments: ("compiled", function(*arguments))

    @fusible
    def double(x: Tensor) -> Tensor:
        return 2 * x

    one = torch.ones(())
    assert double(one) == 2 and made == []
    with fusing(compile):
        assert double(one) == ("compiled", 2) and double(one) == ("compiled", 2)
        with fusing(None):
            assert double(one) == 2
    assert double(one) == 2 and made == ["double"]
