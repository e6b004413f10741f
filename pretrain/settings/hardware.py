"""What a machine has: memory, arithmetic, networks, price. The descriptions are in ``configs/hardware/``, each number with its
source."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import yaml

from data.fault import Fault
from pretrain.settings.config_files import CONFIGS
from pretrain.settings.ranges import one_of, within

FOLDER = CONFIGS / "hardware"


@dataclass
class Machine:
    """``hardware=``: one accelerator, or a CPU."""

    name: str
    accelerator: Annotated[str, one_of("gpu", "cpu")]
    memory_gib: Annotated[float, within(above=0)]
    bf16_tflops: Annotated[float, within(above=0)]
    float32_tflops: Annotated[float, within(above=0)]
    memory_gb_s: Annotated[float, within(above=0)]  # its memory's bandwidth
    intra_node_gb_s: Annotated[float, within(above=0)]  # to the others of its machine, one way
    inter_node_gb_s: Annotated[float, within(above=0)]  # a GPU's share of the network between machines, one way
    utilisation: Annotated[float, within(above=0, most=1)]
    dollars_per_hour: Annotated[float, within(least=0)]
    device_names: list[str] = field(default_factory=list)  # what torch.cuda.get_device_name says of it

    @property
    def peaks(self) -> dict[str, float]:
        """Floating-point operations a second, per precision of a run that they are known at."""
        return {"bf16": self.bf16_tflops * 1e12, "float32": self.float32_tflops * 1e12}

    def peak(self, precision: str) -> float:
        """Floating-point operations a second at the precision that a run computes in. Raises Fault for one it isn't
        known at."""
        if precision not in self.peaks:
            raise Fault(f"trainer.precision={precision} can't be planned: what {self.name} does of it is not known.")
        return self.peaks[precision]


def described(name: str, folder: Path = FOLDER) -> Machine:
    """The machine of that name in ``configs/hardware/``."""
    return Machine(**yaml.safe_load((folder / f"{name}.yaml").read_text()))


def allow_tf32() -> None:
    """Let GPUs multiply float32 matrices as TF32, whose fraction has 10 bits: up to eight times as fast. What is added
    up, stored and updated stays float32, and CPUs multiply as before."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def machine_called(device_name: str, folder: Path = FOLDER) -> Machine | None:
    """The machine in ``configs/hardware/`` that ``torch.cuda.get_device_name`` calls so; None where none is."""
    machines = (described(path.stem, folder) for path in sorted(folder.glob("*.yaml")))
    return next((machine for machine in machines if device_name in machine.device_names), None)


def peak_of(device: torch.device, precision: str) -> float | None:
    """Floating-point operations a second that a process's device can do, known by its name; None for one that isn't
    described."""
    if device.type != "cuda":
        return None
    machine = machine_called(torch.cuda.get_device_name(device))
    return machine.peaks.get(precision) if machine else None
