"""The runs of a sweep one after the other, here, or as an array of jobs.

Each is the command that its line would be, in a process of its own. One that fails is said at the end, and the others
run all the same; the same sweep goes on with what isn't done.
"""

import signal
import subprocess
import sys
from types import FrameType

from data.fault import Fault
from launch.launcher import python_arguments
from launch.local import PASSED_ON
from launch.slurm import Slurm
from pretrain.run import signals
from pretrain.run.preemption import INTERRUPTED, TRY_AGAIN
from pretrain.run.progress import say
from pretrain.settings import plugins
from pretrain.settings.sweeps import Sweep


def run_sweep(sweep: Sweep) -> None:
    """Run or submit them all. Raises Fault where some failed, and SystemExit where the sweep was asked to end."""
    launch = next(iter(sweep.points.values())).launch
    if launch["_target_"] == f"{Slurm.__module__}.{Slurm.__qualname__}":
        launcher = plugins.build(launch, base=Slurm)
        launcher.launch_sweep(sweep)
        return
    failed = []
    for number, (name, composed) in enumerate(sweep.points.items(), 1):
        say(f"run {number} of {len(sweep.points)}: {sweep.folder / name}")
        code = _run_to_its_end([sys.executable, *python_arguments(composed, composed.overrides)])
        if code in (TRY_AGAIN, INTERRUPTED):
            say(
                f"the sweep ends here, {len(sweep.points) - number + 1} of its runs aren't done; the same command continues"
            )
            sys.exit(code)
        if code:
            failed.append(name)
    if failed:
        raise Fault(
            f"{len(failed)} of {len(sweep.points)} runs failed, as said above: {', '.join(failed)}; the same command tries"
            " them again."
        )
    say(f"all {len(sweep.points)} runs are done; 'pretrain report run={sweep.folder}' sets them side by side")


def _run_to_its_end(command: list[str]) -> int:
    """The exit code of a command, which is told all signals that this process is told."""
    told = [signals.noted()] if signals.noted() else []
    # A run that is told before it listens would die of it: it starts deaf, and hears what came once it listens.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ASKING)
    # A group of its own: a terminal's Ctrl-C goes to this process alone, and from here once to the run.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)

    def pass_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ASKING)
    for number in told[:1]:
        process.send_signal(number)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in told:
        return INTERRUPTED
    return code if code >= 0 else 128 - code
