"""The settings under ``trainer:``: machines, precision, memory for time, how often what is done, and what a user hangs
into Lightning's trainer."""

import os
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch

from data.fault import Fault
from models.allowed import Agreements, one_of, within
from pretrain.run.launched import way_out_of_own_gpus
from pretrain.settings.plugins import Plugin

PROFILERS = ("simple", "pytorch")


class Precision(NamedTuple):
    """``masters``: parameters, the optimiser's moments, and gradients from where they are summed. ``compute``: the
    networks' arithmetic."""

    masters: torch.dtype
    compute: torch.dtype


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "float64": Precision(torch.float64, torch.float64),
}

CHECKPOINTING = ("none", "full", "selective")
"""What a block's backward computes anew: nothing; everything; all but linear maps and attention."""


def check_hooks(callbacks: list[Plugin], loggers: list[Plugin]) -> None:
    """`require_hooks`, where there are any: what isn't asked for is not waited for."""
    if callbacks or loggers:
        from pretrain.training.hooks import require_hooks  # brings Lightning with it

        require_hooks(callbacks, loggers)


def check_trial(fast_dev_run: int, profiler: str | None) -> None:
    """Raise ValueError for a profile that would be thrown away with the trial that it is of."""
    if fast_dev_run and profiler:
        raise ValueError(
            "a trial's folder is thrown away, and the profile in it; a run of a few steps, optim.steps=, keeps one"
        )


@dataclass
class TrainerSettings:
    """The settings under ``trainer:``, explained in ``configs/trainer/default.yaml``."""

    accelerator: Annotated[str, one_of("auto", "cpu", "gpu")]
    devices: Annotated[int, within(least=1)]
    nodes: Annotated[int, within(least=1)]
    shard_size: Annotated[int | None, within(least=1)]
    precision: Annotated[str, one_of(*PRECISIONS)]
    activation_checkpointing: Annotated[str, one_of(*CHECKPOINTING)]
    compile: bool
    accumulate: Annotated[int, within(least=1)]
    peak_tflops: Annotated[float | None, within(above=0)]
    log_every: Annotated[int, within(least=1)]
    checkpoint_every: Annotated[int, within(least=0)]
    keep_checkpoints: Annotated[int, within(least=0)]
    keep_every: Annotated[int | None, within(least=1)]
    stalled_minutes: Annotated[float | None, within(above=0, most=100_000)]
    callbacks: list[Plugin]
    loggers: list[Plugin]
    profiler: Annotated[str | None, one_of(*PROFILERS)]
    fast_dev_run: Annotated[int | bool, within(least=0)]

    agreements: ClassVar[Agreements] = {
        ("callbacks", "loggers"): check_hooks,
        ("fast_dev_run", "profiler"): check_trial,
    }


def require_devices(settings: TrainerSettings) -> None:
    """Raise Fault where this machine hasn't the devices that a run asks for."""
    gpus = torch.cuda.device_count()
    if settings.accelerator == "gpu" and not gpus and not torch.backends.mps.is_available():
        raise Fault(
            "trainer.accelerator=gpu, and PyTorch finds no GPU on this machine: trainer.accelerator=cpu trains on its"
            " cores, and 'pretrain doctor' says what there is."
        )
    if settings.accelerator != "cpu" and 0 < gpus < settings.devices:
        way_out = way_out_of_own_gpus(os.environ) or f"set it to {gpus} or less"
        raise Fault(
            f"trainer.devices={settings.devices} is more than the {gpus} GPUs that PyTorch finds on this machine:"
            f" {way_out}."
        )


RESUME = one_of("newest", "previous")
"""Which checkpoint a run goes on from."""
