"""Pure functions of tensors that torch.compile turns into few kernels, while a run that compiles is taking a step.

Their work is elementwise. One operator at a time, each would read and write its tensors whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""`torch.compile`, or it with another backend."""

_compile: ContextVar[Compile | None] = ContextVar("compile", default=None)


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, compiled where it is called while `fusing`; compiled once, and anew where shapes demand it."""
    compiled: dict[Compile, Callable[P, R]] = {}

    @wraps(function)
    def as_asked(*args: P.args, **kwargs: P.kwargs) -> R:
        compile = _compile.get()
        if compile is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compile not in compiled:
            compiled[compile] = compile(function)
        return compiled[compile](*args, **kwargs)

    return as_asked


@contextmanager
def fusing(compile: Compile | None = torch.compile) -> Iterator[None]:
    """While functions that are `fusible` are compiled; None: while they aren't."""
    before = _compile.set(compile)
    try:
        yield
    finally:
        _compile.reset(before)
