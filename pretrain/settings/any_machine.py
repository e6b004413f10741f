"""A network that any machine can build, whatever kernel it is trained with."""

from typing import Any


def on_any_machine(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network with the attention that runs everywhere: it computes the same, and plans, reports and
    embeddings are made where the training's device is not."""
    return model | {"attention": "sdpa"} if "attention" in model else model
