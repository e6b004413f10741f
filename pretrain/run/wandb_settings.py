"""The settings under ``wandb:``, and whether Weights & Biases knows who asks."""

from dataclasses import dataclass
from typing import Annotated

from models.allowed import one_of


@dataclass
class WandbSettings:
    """The settings under ``wandb:``: ``mode`` is off, online or offline."""

    mode: Annotated[str, one_of("off", "online", "offline")]
    project: str


def logged_in() -> bool:
    """Whether W&B has credentials here."""
    import wandb

    return bool(wandb.login(prompt=False))
