"""``launch=torchrun``: a command of several processes under torchrun, which starts all its processes again where one dies."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Annotated

from data.fault import Fault
from data.redaction import redacted
from launch import failures
from launch.launcher import Launcher, folder_of, python_arguments
from launch.passing_on import passing_on
from launch.processes import arrange, refuse_uneven, spreads
from pretrain.run.preemption import TRY_AGAIN
from pretrain.settings.composition import Composed, of_the_command_line
from pretrain.settings.ranges import matching, within

# Seconds that ranks which were asked to end have for their batch and a checkpoint; who is in a hurry kills them sooner.
GRACE_TO_SAVE = 600


@dataclass(kw_only=True)
class Torchrun(Launcher):
    """The settings, explained in ``configs/launch/torchrun.yaml``."""

    nodes: Annotated[int, within(least=1)]
    gpus_per_node: Annotated[int | None, within(least=0)]
    processes_per_node: Annotated[int | None, within(least=1)]
    max_restarts: Annotated[int, within(least=0)]
    endpoint: Annotated[str | None, matching(r"\S+:\d+", "host:port")]
    dry_run: bool

    def launch(self, composed: Composed) -> None:
        composed.object()
        command, logs, began = self.command(composed), folder_of(composed).resolve() / "logs" / "torchrun", time.time()
        # PYTHONSAFEPATH is what -P is elsewhere: torchrun starts the interpreter itself. With the store that torchrun
        # meets in, ranks that are started again would look for those before them, at addresses where nobody is any
        # more.
        surroundings = {failures.LOGS: str(logs), "PYTHONSAFEPATH": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.dry_run:
            print(redacted(shlex.join(["env", *(f"{name}={value}" for name, value in surroundings.items()), *command])))
            return
        code, told = run_and_tell(command, os.environ | surroundings)
        if signal.SIGINT in told:
            raise KeyboardInterrupt
        if told and code:
            sys.exit(TRY_AGAIN)  # torchrun's own code doesn't say what its ranks ended with
        if code:
            if (file := failures.first(logs, since=began)) is not None:
                print(file.read_text(), end="", file=sys.stderr)
            print(f"pretrain: the logs of all ranks are in {logs}", file=sys.stderr)
            sys.exit(1)

    @of_the_command_line()
    def command(self, composed: Composed) -> list[str]:
        """What is started, the same on every node. Raises Fault where the settings don't fit the command or each
        other."""
        if not spreads(composed):
            raise Fault(
                f"'pretrain {composed.command}' is one process: launch=torchrun is for 'tile', 'slide' and 'curate'."
            )
        if self.nodes > 1 and self.endpoint is None:
            raise Fault("launch.endpoint must be given: host:port of one of the nodes, where they find each other.")
        processes, words = arrange(composed, self.nodes, self.gpus_per_node, self.processes_per_node)
        refuse_uneven(composed, processes.count)
        meeting = (
            ["--standalone"]
            if self.nodes == 1
            else ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={folder_of(composed).name}"]
        )
        return [
            sys.executable,
            "-m",
            "launch.torchrun_agent",
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={processes.each}",
            f"--max-restarts={self.max_restarts}",
            f"--shutdown-timeout={GRACE_TO_SAVE}",
            *meeting,
            *python_arguments(composed, words)[1:],
        ]


def run_and_tell(command: list[str], environment: dict[str, str]) -> tuple[int, list[int]]:
    """Run torchrun to its end, or to the one that a signal asks for; its exit code, and the signals that came.

    Whatever came, torchrun is told SIGTERM, and tells its ranks: they answer with a checkpoint, also to Ctrl-C, and
    aren't started again, as they would be if they had been told themselves.
    """
    # A group of its own: Ctrl-C in a terminal goes to this process alone, as any other signal does.
    agent = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)

    def tell(told: list[int]) -> None:
        if len(told) == 1:  # a second one would have torchrun leave its ranks behind
            agent.send_signal(signal.SIGTERM)

    with passing_on(tell) as told:
        return agent.wait(), told
