"""How long a step takes, from what it computes, moves, starts and sends.

The tile stage's ``utilisation`` is what published runs of large networks got of the peak, so it covers what isn't
arithmetic on the GPU: reading and writing memory. Nothing of the kind is known of the slide stage, whose networks are
small: there products get what large ones reach of the peak, and memory is counted. A GPU does products and the rest one
after the other, while the host is ahead of it or else is what is waited for: in both stages it is counted, as a set time
for each operator. Of a compiled run it isn't known, as compiled graphs start fewer than are counted.
"""

from dataclasses import dataclass, replace

from pretrain.plan.communication import communication
from pretrain.plan.estimate import Estimate
from pretrain.settings.hardware import Machine

OF_LARGE_PRODUCTS = 0.6  # of the peak; choice: H100 multiply large bfloat16 matrices at 60 to 70 % of theirs (M)
OF_BANDWIDTH = 0.8  # of memory; choice: what a copy reaches (M)


@dataclass
class StepTime:
    """Seconds of a step and process."""

    arithmetic: float
    memory: float  # what kernels read and write; 0 where utilisation covers it
    host: float  # to start them, optimiser and average left out; 0 without a GPU, or where it isn't known
    communication: float = 0.0
    exposed: float = 0.0  # what of that nothing hides

    @property
    def computing(self) -> float:
        """Without waiting for others."""
        return max(self.arithmetic + self.memory, self.host)

    @property
    def waits_for_host(self) -> bool:
        """Whether the GPU is through with what it was given before the host has more."""
        return self.host > self.arithmetic + self.memory

    @property
    def seconds(self) -> float:
        """All together."""
        return self.computing + self.exposed


def step_time(
    found: Estimate,
    machine: Machine,
    per_node: int,
    *,
    peak: float,
    utilisation: float,
    operator_us: float,
    reads_memory: bool,
) -> StepTime:
    """``peak``: operations a second at the run's precision. ``operator_us``: what an operator costs the host in
    microseconds. ``reads_memory``: whether reading and writing is counted, or covered by ``utilisation``."""
    arithmetic = sum(found.flops.values()) / (peak * utilisation)
    memory = found.moved / (machine.memory_gb_s * 1e9 * OF_BANDWIDTH) if reads_memory else 0.0
    step = StepTime(arithmetic, memory, found.operators * operator_us * 1e-6)
    sends = communication(found, machine, per_node, step.computing)
    return replace(step, communication=sends.seconds, exposed=sends.exposed)
