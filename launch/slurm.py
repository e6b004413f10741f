"""``launch=slurm``: the script of a job, as a pure function of the settings, and its submission.

A training job is one ``srun`` of a task a GPU, or a process on CPUs. SLURM tells the tasks that the time is nearly
over; they save and put the job back into the queue. Any other command is one task, or as many as share its work: there
the script is told, and puts the job back; the command goes on where it was, if it has finished anything in that time.
"""

import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from data.fault import Fault
from data.redaction import is_private
from launch.array import merging
from launch.failures import LOGS
from launch.launcher import Launcher, folder_of, python_arguments
from launch.local import TRAINING
from launch.processes import Processes, arrange, refuse_uneven, trains
from launch.submit import announce, announce_chain, submit
from pretrain.run.preemption import TRY_AGAIN
from pretrain.run.progress import say
from pretrain.settings.command_schema import file_stem
from pretrain.settings.composition import Composed, of_the_command_line
from pretrain.settings.ranges import matching, within
from pretrain.settings.sweeps import Sweep, of_each_point


@dataclass(frozen=True)
class Job:
    """What one script runs."""

    origin: str  # the command line that made it
    arguments: list[
        str
    ]  # of the interpreter; of an array, one of the words is part={part} or {point}, which each of its jobs fills in
    processes: Processes
    trains: bool
    name: str
    logs: Path  # its log is <logs>/<job>.log, those of its processes <logs>/<job>/rank-<rank>.log
    directory: Path  # where relative paths begin
    doctor: list[str] = field(default_factory=list)  # arguments of 'pretrain doctor', if every node is to run it first
    array: int = 0  # jobs
    points: list[list[str]] = field(default_factory=list)  # the words of each job of a sweep
    after: list[str] = field(default_factory=list)  # numbers of jobs
    chained: bool = False  # whether it is followed by others that go on with the same


WRITTEN = {
    **{
        name: f"give launch.{setting}="
        for names, setting in (
            ("J job-name", "name"),
            ("p partition", "partition"),
            ("A account", "account"),
            ("q qos", "qos"),
            ("t time", "time"),
            ("N nodes", "nodes"),
            ("n ntasks ntasks-per-node", "processes_per_node"),
            ("G gpus gpus-per-node", "gpus_per_node"),
            ("c cpus-per-task", "cpus_per_task"),
            ("mem", "mem"),
            ("a array", "array"),
            ("x exclude", "exclude"),
            ("d dependency", "after"),
            ("signal", "signal_seconds"),
            ("requeue no-requeue", "requeue"),
        )
        for name in names.split()
    },
    **dict.fromkeys(["o", "output", "e", "error", "open-mode"], "the logs lie in the run's folder, or launch.folder="),
    **dict.fromkeys(["D", "chdir"], "submit from the folder where relative paths begin"),
    **dict.fromkeys(["wrap", "parsable", "W", "wait"], "leave it out"),
}
"""Options of sbatch that have a meaning for the script, by both of their names, with what sets them."""

HIDING_GPUS = ("gpus-per-task", "ntasks-per-gpu", "gpu-bind")
"""Options by which a task sees some of its node's GPUs alone; each process looks for all, and takes that of its number."""

POINT = "{point}"  # stands for the words of a job of a sweep

TIME = matching(
    r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE",
    "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds",
)
OPTION = matching(r"-\S.*", "an option as it is written in a shell: --constraint=h100")


@dataclass(kw_only=True)
class Slurm(Launcher):
    """The settings, explained in ``configs/launch/slurm.yaml``."""

    partition: str | None
    account: str | None
    qos: str | None
    time: Annotated[str | None, TIME]
    nodes: Annotated[int, within(least=1)]
    gpus_per_node: Annotated[int | None, within(least=0)]
    processes_per_node: Annotated[int | None, within(least=1)]
    cpus_per_task: Annotated[int | None, within(least=1)]
    mem: Annotated[str | None, matching(r"\d+[KMGTkmgt]?", "a number of megabytes, or one with a unit: 64G")]
    array: Annotated[int | None, within(least=1)]
    array_at_once: Annotated[int | None, within(least=1)]
    after: Annotated[list[str], matching(r"\d+(_\d+)?", "the number of a job: 4711, or 4711_3 of an array")]
    exclude: Annotated[
        list[str],
        matching(r"[\w.-]+(\[[\d,-]+\])?[\w.-]*", "the name of a node, or names as SLURM writes them: n[1-3]"),
    ]
    chain: Annotated[int | None, within(least=2, most=1000)]
    requeue: bool
    signal_seconds: Annotated[int, within(least=1, most=65535)]
    name: str | None
    folder: str | None
    setup: list[str]
    container: str | None
    python: str | None
    srun: Annotated[list[str], OPTION]
    sbatch: Annotated[list[str], OPTION]
    doctor: bool
    dry_run: bool

    def launch(self, composed: Composed) -> None:
        self.refuse_contradictions()
        folder = Path(self.folder) if self.folder else folder_of(composed)
        processes, words = self._checked(composed)
        merge = None
        if self.array:
            merge = merging(composed)
            words = [*words, "part={part}"]
        job = Job(
            origin=shlex.join(["pretrain", *composed.command.split(), *composed.overrides]),
            arguments=python_arguments(composed, words),
            processes=processes,
            trains=trains(composed),
            name=self.name or f"{file_stem(composed.command)}-{folder.name}",
            logs=folder.resolve() / "logs",
            directory=Path.cwd(),
            doctor=_doctors_arguments(composed, words, folder) if self.doctor else [],
            array=self.array or 0,
            after=self.after,
            chained=self.chain is not None,
        )
        self._say_of_cores(processes)
        text, path = script(self, job), folder / f"{file_stem(composed.command)}.sbatch"
        if self.dry_run:
            print(text, end="")
            for _ in range(1, self.chain or 1):
                print(
                    f"\n# and then: sbatch --dependency={dependency(self.after, 'THE_ONE_BEFORE')}"
                    f" {shlex.quote(str(path))}"
                )
        else:
            number = submit(path, text, job.logs)
            announce(number, job.name, path, job.logs, array=job.array)
            numbers = [number]
            for _ in range(1, self.chain or 1):
                numbers.append(submit(path, text, job.logs, dependency(self.after, numbers[-1])))
            announce_chain(numbers)
        if merge:
            # It only reads and writes indexes: one process without a GPU.
            last = Job(
                origin=job.origin,
                arguments=["-P", "-m", "pretrain", *merge],
                processes=Processes(1, 1, 0),
                trains=False,
                name=f"{job.name}-merge",
                logs=job.logs,
                directory=job.directory,
                after=["ARRAY" if self.dry_run else number],
            )
            text, path = script(self, last), folder / "merge.sbatch"
            if self.dry_run:
                print(f"\n{text}", end="")
            else:
                announce(submit(path, text, last.logs), last.name, path, last.logs)

    def launch_sweep(self, sweep: Sweep) -> bool:
        """Submit the runs of a sweep as one array of jobs. Raises Fault for runs that can't share one script."""
        self.refuse_contradictions()
        if self.array or self.chain:
            raise Fault(
                "launch.array= and launch.chain= aren't for a sweep, which is an array of jobs itself: leave them out;"
                " each of them goes back into the queue by itself."
            )
        checked = list(of_each_point(sweep.points, self._checked).values())
        first, processes = next(iter(sweep.points.values())), checked[0][0]
        if any(other != processes for other, _ in checked):
            raise Fault("the runs of a sweep are one array of jobs, all with as many nodes, GPUs and processes.")
        folder = Path(self.folder) if self.folder else sweep.folder
        job = Job(
            origin=shlex.join(["pretrain", sweep.command, "--multirun", *sweep.words]),
            arguments=python_arguments(first, [POINT]),
            processes=processes,
            trains=True,
            name=self.name or f"{file_stem(sweep.command)}-{sweep.folder.name}",
            logs=folder.resolve() / "logs",
            directory=Path.cwd(),
            doctor=_doctors_arguments(first, [POINT], folder) if self.doctor else [],
            array=len(checked),
            points=[words for _, words in checked],
            after=self.after,
        )
        self._say_of_cores(processes)
        text, path = script(self, job), folder / f"{file_stem(sweep.command)}.sbatch"
        if self.dry_run:
            print(text, end="")
        else:
            announce(submit(path, text, job.logs), job.name, path, job.logs, array=job.array)
        return True

    def _checked(self, composed: Composed) -> tuple[Processes, list[str]]:
        """The processes of a command, and its words. Raises Fault for what would be found out when the job's turn
        comes."""
        config = composed.object()
        _refuse_secrets(composed.overrides)
        processes, words = arrange(composed, self.nodes, self.gpus_per_node, self.processes_per_node)
        refuse_uneven(composed, processes.count)
        if composed.command in TRAINING:
            from pretrain.run.folder import allowed_changes  # which imports Lightning and FSDP, for seconds

            # The data may be made by a job that this one waits for; what the run's folder holds is there now.
            allowed_changes(Path(composed.tree.run), config, data=None)
        return processes, words

    def _say_of_cores(self, processes: Processes) -> None:
        if (
            processes.gpus
            and not self.cpus_per_task
            and not any(word.startswith("--cpus-per-gpu") for word in self.sbatch)
        ):
            say(
                "launch.cpus_per_task isn't given: on many clusters a process then has one core to feed its GPU; give"
                " it what a node has for each"
            )

    @of_the_command_line()
    def refuse_contradictions(self) -> None:
        """Raise Fault for settings that are each allowed, and not together, and for what would end a line of the
        script's head."""
        for name, value in vars(self).items():
            if name != "setup" and re.search(r"[\n\r]", " ".join(value) if isinstance(value, list) else str(value)):
                raise Fault(f"launch.{name} holds a line break, which would end a line of the script: leave it out.")
        if self.chain and self.array:
            raise Fault(
                "launch.chain= and launch.array= exclude each other: of an array every job goes back into the queue by"
                " itself."
            )
        for setting, option in [*(("srun", one) for one in self.srun), *(("sbatch", one) for one in self.sbatch)]:
            name, value = re.match(r"-*([\w-]*)[\s=]*(.*)", option).groups()  # type: ignore[union-attr]
            if name in HIDING_GPUS and value != "none":
                raise Fault(
                    f"launch.{setting} holds {option}, by which a process sees some of its node's GPUs alone: leave it"
                    " out; launch.gpus_per_node= asks for them, and each process takes one."
                )
            if name in WRITTEN and setting == "sbatch":
                raise Fault(f"launch.sbatch holds {option}, and the script says that itself: {WRITTEN[name]}.")
        limit = seconds(self.time) if self.time else 0
        if self.time and not limit and re.match(r"\d", self.time):
            raise Fault(
                f"launch.time={self.time} is no time: give it some, or launch.time=UNLIMITED where the cluster has"
                " that."
            )
        if 0 < limit <= self.signal_seconds and (self.requeue or self.chain):
            raise Fault(
                f"launch.signal_seconds={self.signal_seconds} is not less than launch.time={self.time}, so a job would"
                " be told to stop as soon as it starts: give it more time, or launch.signal_seconds= less."
            )


def seconds(time: str) -> int:
    """A time limit as sbatch reads it; 0 for none."""
    days, dash, rest = time.rpartition("-")
    if not re.match(r"\d", rest):
        return 0
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def dependency(after: list[str], before: str | None = None) -> str | None:
    """What a job waits for: that jobs have ended well, and that the one before it in a chain has ended, however."""
    kinds = [f"afterok:{':'.join(after)}"] if after else []
    return ",".join([*kinds, f"afterany:{before}"] if before else kinds) or None


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


@of_the_command_line()
def _refuse_secrets(words: list[str]) -> None:
    """Raise Fault where the command line has what must not be in a script."""
    for word in words:
        if is_private(word):
            raise Fault(
                f"launch=slurm writes the command into a script, and {word.partition('=')[0]}= holds a password or a"
                " token: put a variable of the environment in its place, '${oc.env:NAME}', or leave it to fsspec's"
                " configuration (FSSPEC_HTTPS, ~/.config/fsspec)."
            )


def script(settings: Slurm, job: Job) -> str:
    """The text that sbatch is given."""
    log = "%A_%a" if job.array else "%j"
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID"
    at_once = f"%{settings.array_at_once}" if settings.array_at_once else ""
    # Tasks that train are told themselves; of other commands the script is.
    told = "" if job.trains else "B:"
    requeue = settings.requeue and not job.chained
    options = {
        "job-name": job.name,
        "chdir": job.directory,
        "output": f"{str(job.logs).replace('%', '%%')}/{log}.log",
        "open-mode": "append",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "nodes": job.processes.nodes,
        "ntasks-per-node": job.processes.each,
        "gpus-per-node": job.processes.gpus or None,
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.mem,
        "array": f"0-{job.array - 1}{at_once}" if job.array else None,
        "exclude": ",".join(settings.exclude) or None,
        "dependency": dependency(job.after),
        "kill-on-invalid-dep": "yes" if job.after else None,
        "signal": f"{told}USR1@{settings.signal_seconds}" if requeue or job.chained else None,
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines += ["--requeue" if requeue else "--no-requeue", *settings.sbatch]
    head = "\n".join(f"#SBATCH {line}" for line in lines)
    setup = "".join(f"{line}\n" for line in settings.setup)
    return f"""\
#!/bin/bash
# Written by: {_one_line(job.origin)}
{head}

export {LOGS}={shlex.quote(str(job.logs))}/{number}
mkdir -p "${LOGS}"
{_point(job)}{_parallel(settings, job)}{setup}{_doctor(settings, job)}
{_run(settings, job)}
if [ $code -ne 0 ]; then
    # Of all ranks' errors the first; what others say after it ("follows-…") is its consequence.
    attempt=$(printf %03d "${{SLURM_RESTART_COUNT:-0}}")
    first=$(ls "${LOGS}"/error-$attempt-* "${LOGS}"/follows-$attempt-* 2>/dev/null | head -n 1)
    [ -n "$first" ] && cat "$first"
    node=$(sed -n 's/^pretrain: rank [0-9]* on \\([^ ]*\\) failed first.*/; launch.exclude=\\1 leaves that node out, should it be at fault/p' "$first" 2>/dev/null | tail -n 1)
    echo "pretrain: exit code $code; the logs of all ranks are in ${LOGS}$node"
fi
exit $code
"""


def _point(job: Job) -> str:
    """The words of each job of a sweep, by its number."""
    if not job.points:
        return ""
    cases = "\n".join(f"{number}) point=({shlex.join(words)}) ;;" for number, words in enumerate(job.points))
    return f"""\
# Each job is a run of the sweep.
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""


def _parallel(settings: Slurm, job: Job) -> str:
    if not job.trains and job.processes.count == 1:
        return ""
    threads = settings.cpus_per_task or 1
    return f"""\
# This script runs on the first node, and so does rank 0.
export MASTER_ADDR=$(hostname) MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS={threads}
# Tensors change size from step to step; pieces of memory that can't be joined would fill a GPU.
export PYTORCH_ALLOC_CONF=${{PYTORCH_ALLOC_CONF:-expandable_segments:True}}
"""


def _words(settings: Slurm, job: Job, arguments: list[str]) -> str:
    """A command's line, a setting a line."""
    python = settings.python or sys.executable
    words = [shlex.quote(word) for word in [python, *arguments]]
    if job.array:
        words = ['"${point[@]}"' if word == shlex.quote(POINT) else word for word in words]
        words = [word.replace("'part={part}'", f'part="$((SLURM_ARRAY_TASK_ID + 1))/{job.array}"') for word in words]
    settings_from = next((i for i, word in enumerate(words) if "=" in word), len(words))
    first = " ".join([*([settings.container] if settings.container else []), *words[:settings_from]])
    return " \\\n    ".join([first, *words[settings_from:]])


def _doctor(settings: Slurm, job: Job) -> str:
    if not job.doctor:
        return ""
    line = _words(settings, job if job.points else replace(job, array=0), job.doctor)
    srun = _srun(settings, f"--ntasks={job.processes.nodes}", "--ntasks-per-node=1")
    return f"""
# Is every node fit for it?
{srun} {line} || exit 1
"""


def _doctors_arguments(composed: Composed, words: list[str], folder: Path) -> list[str]:
    """The doctor knows the settings of what trains; of other commands it is told where they work."""
    doctor = {"tile": "doctor", "slide": "doctor slide"}.get(composed.command)
    if doctor is None:
        given = [
            word.partition("=")[2] for word in words if word.lstrip("+").startswith(("run=", "out="))
        ]  # quoted as the user did
        doctor, words = "doctor machine", [f"run={given[0] if given else folder}"]
    return python_arguments(replace(composed, command=doctor), words)


def _srun(settings: Slurm, *options: str) -> str:
    """srun with options of its own and those that each step needs: what is in the container, and the cores that it
    doesn't take over from sbatch."""
    cores = [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else []
    return " ".join(["srun", *options, *cores, *settings.srun])


def _run(settings: Slurm, job: Job) -> str:
    # In srun's file names a percent sign begins a replacement, in the shell's it doesn't.
    srun = _srun(settings, "--kill-on-bad-exit=1", f'--output="${{{LOGS}//%/%%}}"/rank-%5t.log', "--open-mode=append")
    line = f"{srun} \\\n    {_words(settings, job, job.arguments)}"
    if job.trains or not (settings.requeue or job.chained):
        return f"{line}\ncode=$?"
    if job.chained:
        return f"""\
# The time is nearly over: the next job of the chain goes on.
trap 'echo "pretrain: out of time, the next job of the chain goes on"; kill $!; exit {TRY_AGAIN}' USR1
{line} &
wait $!
code=$?"""
    folder = shlex.quote(str(job.logs.parent))
    return f"""\
# The time is nearly over: back into the queue, where the command goes on. What isn't finished has a name that begins with a dot.
finished() {{ (cd {folder} && find . -path ./logs -prune -o -type f ! -name '.*' -printf '%s\\n') | awk '{{ bytes += $1 }} END {{ print bytes + 0 }}'; }}
before=$(finished)
again() {{
    if [ "$(finished)" = "$before" ]; then
        echo "pretrain: out of time with nothing finished, and so it would be again: give it more, launch.time="
        kill $!; exit 1
    fi
    echo "pretrain: out of time, requeued"; scontrol requeue "$SLURM_JOB_ID"; sleep 600
}}
trap again USR1
{line} &
wait $!
code=$?"""
