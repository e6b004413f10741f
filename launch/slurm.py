"""``launch=slurm``: the script of a job, as a pure function of the settings, and its submission.

A training job is one ``srun`` of a task a GPU, or a process on CPUs. SLURM tells the tasks that the time is nearly over; they save and put the
job back into the queue. Any other command is one task: there the script is told, and puts the job back; the command goes on where it was,
if it has finished anything in that time.
"""

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.fault import Fault
from data.redaction import is_private
from launch.array import merging
from launch.failures import LOGS
from launch.launcher import Launcher, folder_of, python_arguments
from launch.processes import Processes, arrange, trains
from launch.submit import announce, submit
from pretrain.settings import Composed, stem


@dataclass(frozen=True)
class Job:
    """What one script runs."""

    origin: str  # the command line that made it
    arguments: list[
        str
    ]  # of the interpreter; of an array, one of the words is part={part}, which each of its jobs fills in
    processes: Processes
    trains: bool
    name: str
    logs: Path  # its log is <logs>/<job>.log, those of its processes <logs>/<job>/rank-<rank>.log
    directory: Path  # where relative paths begin
    doctor: list[str] = field(default_factory=list)  # arguments of 'pretrain doctor', if every node is to run it first
    array: int = 0  # jobs
    after: list[str] = field(default_factory=list)  # numbers of jobs


@dataclass(kw_only=True)
class Slurm(Launcher):
    """The settings, explained in ``configs/launch/slurm.yaml``."""

    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    nodes: int
    gpus_per_node: int | None
    processes_per_node: int | None
    cpus_per_task: int | None
    mem: str | None
    array: int | None
    array_at_once: int | None
    after: list[str]
    requeue: bool
    signal_seconds: int
    name: str | None
    folder: str | None
    setup: list[str]
    container: str | None
    python: str | None
    srun: list[str]
    sbatch: list[str]
    doctor: bool
    dry_run: bool

    def launch(self, composed: Composed) -> None:
        composed.object()  # what is missing or mistyped is said now, and not when the job's turn comes
        _refuse_secrets(composed.overrides)
        folder = Path(self.folder) if self.folder else folder_of(composed)
        processes, words = arrange(composed, self.nodes, self.gpus_per_node, self.processes_per_node)
        merge = None
        if self.array:
            merge = merging(composed)
            words = [*words, "part={part}"]
        job = Job(
            origin=shlex.join(["pretrain", *composed.command.split(), *composed.overrides]),
            arguments=python_arguments(composed, words),
            processes=processes,
            trains=trains(composed),
            name=self.name or f"{stem(composed.command)}-{folder.name}",
            logs=folder.resolve() / "logs",
            directory=Path.cwd(),
            doctor=_doctors_arguments(composed, words, folder) if self.doctor else [],
            array=self.array or 0,
            after=self.after,
        )
        text, path = script(self, job), folder / f"{stem(composed.command)}.sbatch"
        if self.dry_run:
            print(text, end="")
        else:
            number = submit(path, text, job.logs)
            announce(number, job.name, path, job.logs, array=job.array)
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


def _refuse_secrets(words: list[str]) -> None:
    """Raise Fault where the command line has what must not be in a script."""
    for word in words:
        if is_private(word):
            raise Fault(
                f"launch=slurm writes the command into a script, and {word.partition('=')[0]}= holds a password or a token: put a variable of "
                "the environment in its place, '${oc.env:NAME}', or leave it to fsspec's configuration (FSSPEC_HTTPS, ~/.config/fsspec)."
            )


def script(settings: Slurm, job: Job) -> str:
    """The text that sbatch is given."""
    log = "%A_%a" if job.array else "%j"
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID"
    at_once = f"%{settings.array_at_once}" if settings.array_at_once else ""
    # Tasks that train are told themselves; of other commands the script is.
    told = "" if job.trains else "B:"
    options = {
        "job-name": job.name,
        "chdir": job.directory,
        "output": job.logs / f"{log}.log",
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
        "dependency": f"afterok:{':'.join(job.after)}" if job.after else None,
        "kill-on-invalid-dep": "yes" if job.after else None,
        "signal": f"{told}USR1@{settings.signal_seconds}" if settings.requeue else None,
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines += ["--requeue" if settings.requeue else "--no-requeue", *settings.sbatch]
    head = "\n".join(f"#SBATCH {line}" for line in lines)
    setup = "".join(f"{line}\n" for line in settings.setup)
    return f"""\
#!/bin/bash
# Written by: {job.origin}
{head}

export {LOGS}={shlex.quote(str(job.logs))}/{number}
mkdir -p "${LOGS}"
{_parallel(settings, job)}{setup}{_doctor(settings, job)}
{_run(settings, job)}
if [ $code -ne 0 ]; then
    # Of all ranks' errors the first; what others say after it ("follows-…") is its consequence.
    attempt=$(printf %03d "${{SLURM_RESTART_COUNT:-0}}")
    first=$(ls "${LOGS}"/error-$attempt-* "${LOGS}"/follows-$attempt-* 2>/dev/null | head -n 1)
    [ -n "$first" ] && cat "$first"
    echo "pretrain: exit code $code; the logs of all ranks are in ${LOGS}"
fi
exit $code
"""


def _parallel(settings: Slurm, job: Job) -> str:
    if not job.trains:
        return ""
    threads = settings.cpus_per_task or 1
    return f"""\
# This script runs on the first node, and so does rank 0.
export MASTER_ADDR=$(hostname) MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS={threads}
"""


def _words(settings: Slurm, job: Job, arguments: list[str]) -> str:
    """A command's line, a setting a line."""
    python = settings.python or sys.executable
    words = [shlex.quote(word) for word in [python, *arguments]]
    if job.array:
        words = [word.replace("'part={part}'", f'part="$((SLURM_ARRAY_TASK_ID + 1))/{job.array}"') for word in words]
    settings_from = next((i for i, word in enumerate(words) if "=" in word), len(words))
    first = " ".join([*([settings.container] if settings.container else []), *words[:settings_from]])
    return " \\\n    ".join([first, *words[settings_from:]])


def _doctor(settings: Slurm, job: Job) -> str:
    if not job.doctor:
        return ""
    line = _words(settings, replace(job, array=0), job.doctor)
    return f"""
# Is every node fit for it?
srun --ntasks={job.processes.nodes} --ntasks-per-node=1 {line} || exit 1
"""


def _doctors_arguments(composed: Composed, words: list[str], folder: Path) -> list[str]:
    """The doctor knows the settings of what trains; of other commands it is told where they work."""
    doctor = {"tile": "doctor", "slide": "doctor slide"}.get(composed.command)
    if doctor is None:
        given = [
            word.partition("=")[2] for word in words if word.startswith(("run=", "out="))
        ]  # quoted as the user did
        doctor, words = "doctor machine", [f"run={given[0] if given else folder}"]
    return python_arguments(replace(composed, command=doctor), words)


def _run(settings: Slurm, job: Job) -> str:
    options = ["--kill-on-bad-exit=1", f'--output="${LOGS}"/rank-%5t.log', "--open-mode=append"]
    if settings.cpus_per_task:
        options.append(f"--cpus-per-task={settings.cpus_per_task}")  # which srun doesn't take over from sbatch
    srun = " ".join(["srun", *options, *settings.srun])
    line = f"{srun} \\\n    {_words(settings, job, job.arguments)}"
    if job.trains or not settings.requeue:
        return f"{line}\ncode=$?"
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
