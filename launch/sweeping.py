"""The runs of a sweep one after the other, here, or as an array of jobs.

Each is the command that its line would be, in a process of its own. One that fails is said at the end, and the others
run all the same; the same sweep goes on with what isn't done. A sweep that was killed may leave its run training, which
holds its folder: that run hasn't failed when the sweep is run again, and isn't done.
"""

import signal
import subprocess
import sys

from data.fault import Fault
from data.lease import held_by
from launch.launcher import Launcher, python_arguments
from launch.passing_on import deafen, passing_on
from pretrain.run.preemption import INTERRUPTED, TRY_AGAIN
from pretrain.run.progress import say
from pretrain.settings import plugins
from pretrain.settings.sweeps import Sweep


def run_sweep(sweep: Sweep) -> None:
    """Run or submit them all. Raises Fault where some failed, and SystemExit where the sweep was asked to end or some
    of its runs go on elsewhere."""
    launcher = plugins.build(next(iter(sweep.points.values())).launch, base=Launcher)
    if launcher.launch_sweep(sweep):
        return
    failed: list[str] = []
    elsewhere: list[str] = []
    for number, (name, composed) in enumerate(sweep.points.items(), 1):
        say(f"run {number} of {len(sweep.points)}: {sweep.folder / name}")
        code = _run_to_its_end([sys.executable, *python_arguments(composed, composed.overrides)])
        if code in (TRY_AGAIN, INTERRUPTED):
            say(
                f"the sweep ends here, {len(sweep.points) - number + 1} of its runs aren't done; the same command continues"
            )
            sys.exit(code)
        if code:
            (elsewhere if held_by(sweep.folder / name) else failed).append(name)
    if elsewhere:
        say(
            f"what goes on elsewhere, as said above: {', '.join(elsewhere)}, {len(elsewhere)} of {len(sweep.points)} runs;"
            " give the same command again when that has ended"
        )
    if failed:
        raise Fault(
            f"{len(failed)} of {len(sweep.points)} runs failed, as said above: {', '.join(failed)}; the same command tries"
            " them again."
        )
    if elsewhere:
        sys.exit(TRY_AGAIN)
    say(f"all {len(sweep.points)} runs are done; 'pretrain report run={sweep.folder}' sets them side by side")


def _run_to_its_end(command: list[str]) -> int:
    """The exit code of a command, which is told all signals that this process is told."""
    deafen()
    # A group of its own: a terminal's Ctrl-C goes to this process alone, and from here once to the run.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    with passing_on(lambda told: process.send_signal(told[-1])) as told:
        code = process.wait()
    if signal.SIGINT in told:
        return INTERRUPTED
    return code if code >= 0 else 128 - code
