"""A run as a plan sees it: how to build its objective at any depth, and its batches for any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from pretrain.objectives.interface import Objective
from pretrain.plan.augmentation import augmentation_memory
from pretrain.plan.batches import SupposedSlides, slide_batch, tile_batch, views_and_sides
from pretrain.plan.rehearsal import RehearsedBatch
from pretrain.settings import plugins
from pretrain.settings.annotation import as_dictionary
from pretrain.settings.any_machine import on_any_machine
from pretrain.settings.composition import Composed
from pretrain.training.even_shares import micro_batch_share
from pretrain.training.slide_settings import build_slide_network

DEPTHS = (("model", "depth"), ("objective", "decoder_depth"))
"""Settings that say how many equal blocks there are."""


@dataclass
class RunShape:
    """The settings that matter, and what they build. ``depths``: the settings of `DEPTHS` that the run has."""

    stage: str
    model: dict[str, Any]
    objective: dict[str, Any]
    data: DictConfig
    trainer: DictConfig
    watch: DictConfig
    steps: int
    slides: SupposedSlides
    depths: dict[tuple[str, str], int] = field(init=False)

    def __post_init__(self) -> None:
        of = {"model": self.model, "objective": self.objective}
        self.depths = {(node, name): of[node][name] for node, name in DEPTHS if isinstance(of[node].get(name), int)}

    def build(self, depths: dict[tuple[str, str], int] | None = None) -> Callable[[], Objective]:
        """What builds the objective, with other depths if given."""
        model, objective = dict(self.model), dict(self.objective)
        for (node, name), depth in (depths or {}).items():
            (model if node == "model" else objective)[name] = depth
        if self.stage == "slide":
            widths = [self.slides.width] * (1 + len(self.data.further))  # what is supposed of one is of all
            return lambda: plugins.build(objective, lambda: build_slide_network(model, widths))
        return lambda: plugins.build(objective, lambda: plugins.build(model))

    def batch(self, processes: int, accumulate: int, largest: bool = True, together: int = 1) -> RehearsedBatch:
        """A process's micro-batches, two at most: further pairs are like them. One by itself is not, as FSDP widens and
        adds up gradients only where there are several. Raises Fault where the settings don't divide.

        ``largest``: for the slide stage, with the largest slide among them, instead of mean slides alone. Processes
        that share slides (``together``) have the same batch.
        """
        parts, mine = min(accumulate, 2), micro_batch_share(self, processes, accumulate, together)
        if self.stage == "slide":
            return slide_batch(self.objective, self.data, self.slides, mine, parts, largest)
        return tile_batch(self.model, self.objective, self.data, mine, parts)

    def augmentation(self, samples: int) -> int:
        """Bytes that the augmentation of a micro-batch takes on a GPU, beside the batch; slides have none there."""
        if self.stage == "slide":
            return 0
        return augmentation_memory(self.data, samples, views_and_sides(self.model, self.objective, self.data))


def run_shape(composed: Composed, slides: SupposedSlides) -> RunShape:
    """The shape of the run that a configuration describes."""
    tree = composed.tree
    model, objective = on_any_machine(as_dictionary(tree.model)), as_dictionary(tree.objective)
    return RunShape(composed.command, model, objective, tree.data, tree.trainer, tree.watch, tree.optim.steps, slides)
