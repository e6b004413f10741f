"""Published runs against their plans: the share of the peak that their GPU hours imply."""

from dataclasses import dataclass
from typing import Annotated

from pretrain.plan.batches import SupposedSlides
from pretrain.plan.composed_run import compose_run
from pretrain.plan.estimate import Settings, estimate, parameter_counts
from pretrain.plan.run_shape import run_shape
from pretrain.settings.hardware import described
from pretrain.settings.ranges import within


@dataclass
class PublishedRun:
    """``runs:`` in ``configs/plan.yaml``."""

    hardware: str
    gpu_hours: Annotated[float, within(above=0)]
    samples: Annotated[int, within(least=1)]
    gpus: Annotated[int | None, within(least=1)] = None  # None: as many as the recipe has lanes


@dataclass
class Implied:
    """A row of the table."""

    recipe: str
    parameters: int  # of the encoder
    gflops: float  # of a sample
    samples: int
    machine: str
    gpu_hours: float
    utilisation: float


def implied(recipe: str, published: PublishedRun, slides: SupposedSlides) -> Implied:
    """Operations of our plan of ``recipe`` over what its GPUs could have done in the hours that were published."""
    run = run_shape(compose_run([f"recipe={recipe}", "trainer.precision=bf16"], []), slides)
    processes = published.gpus or run.data.lanes
    of_all = Settings(processes, processes, "bf16", "none", 1)
    found = estimate(run, of_all, fused_attention=True, largest=False)
    each = sum(found.flops.values()) / found.samples
    share = each * published.samples / (published.gpu_hours * 3600 * described(published.hardware).peak("bf16"))
    return Implied(
        recipe,
        parameter_counts(run)["encoder"],
        each / 1e9,
        published.samples,
        published.hardware,
        published.gpu_hours,
        share,
    )
