"""What a machine has: memory, arithmetic, price. The descriptions are in ``configs/hardware/``, each number with its source."""

from dataclasses import dataclass

from data.fault import Fault


@dataclass
class Machine:
    """``hardware=``: one accelerator, or a CPU."""

    name: str
    accelerator: str  # gpu or cpu
    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    utilisation: float
    dollars_per_hour: float

    def peak(self, precision: str) -> float:
        """Floating-point operations a second at the precision that a run computes in. Raises Fault for another."""
        peaks = {"bf16": self.bf16_tflops, "float32": self.float32_tflops}
        if precision not in peaks:
            raise Fault(f"trainer.precision={precision} can't be planned: what {self.name} does of it is not known.")
        return peaks[precision] * 1e12
