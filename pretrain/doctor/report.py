"""What the doctor's commands have in common: what is looked at whatever runs, and how findings are said."""

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from data.fault import Fault
from data.redaction import redacted
from pretrain.doctor import cores, folder, gpus, machine, services
from pretrain.doctor.finding import Finding, failed
from pretrain.objectives.interface import Objective
from pretrain.run.wandb_settings import WandbSettings, logged_in
from pretrain.training.trainer_settings import TrainerSettings

Check = Callable[[], list[Finding]]


def say_findings(checks: list[Check]) -> None:
    """Print a line for every finding, as it is made. Raises Fault in the end where anything fails.

    Under srun one process of each node speaks, with the node's name.
    """
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        return
    host = f"{platform.node()}: " if "SLURM_STEP_ID" in os.environ else ""
    worst, said = False, set[str]()
    for check in checks:
        for finding in check():
            if finding.says in said:
                continue  # by another check, of the same thing
            said.add(finding.says)
            print(redacted(f"{host}{finding.status:<5} {finding.about:<13} {finding.says}"), flush=True)
            worst |= finding.status == "FAIL"
    if worst:
        sys.stdout.flush()
        raise Fault(f"{host}what says FAIL above keeps a job from running well.")


def of_processes(trainer: TrainerSettings, threads: int | None) -> list[Check]:
    """Versions, accelerators, the cores and GPUs of a run's processes on this machine, and an all-reduce of theirs.

    ``threads``: those of a process's loader, None where that isn't a setting.
    """
    gpu, devices = machine.on_gpu(trainer.accelerator), trainer.devices
    return [
        machine.versions,
        *of_machine(trainer.accelerator, devices, trainer.precision, threads),
        *([lambda: gpus.check_allocator(os.environ)] if gpu else []),
        lambda: machine.all_reduce(devices if gpu else max(2, devices), gpu),
    ]


def of_machine(accelerator: str, devices: int, precision: str, threads: int | None) -> list[Check]:
    """Accelerators, and cores and GPUs for so many processes."""
    gpu = machine.on_gpu(accelerator)
    checks: list[Check] = [
        lambda: machine.accelerators(accelerator, devices, precision, os.environ),
        lambda: cores.check_cores(devices, threads, gpu, os.environ, cores.usable_cores()),
    ]
    if gpu:
        checks += [
            lambda: gpus.check_peer_access(len(gpus.visible_gpus(devices))),
            lambda: gpus.check_under_load(gpus.visible_gpus(devices)),
        ]
    return checks


def of_folder(place: Path) -> list[Check]:
    """Writing and renaming there, and whether all nodes of a job see it."""
    return [
        lambda: folder.write_and_rename(place),
        lambda: folder.links_and_locks(place),
        lambda: folder.seen_by_all_nodes(place, os.environ),
    ]


def run_checks(
    place: Path,
    make_objective: Callable[[], Objective],
    steps: int,
    trainer: TrainerSettings,
    wandb: WandbSettings,
    partition: str | None,
) -> list[Check]:
    """Disk room for a run's checkpoints, its record, and SLURM."""

    def room() -> list[Finding]:
        try:
            each = folder.checkpoint_bytes(folder.built(make_objective))
        except Fault as fault:
            return [failed("disk", f"how large a checkpoint is can't be told: {fault}")]
        return folder.check_room(place, each, trainer.keep_checkpoints, steps, trainer.checkpoint_every)

    return [
        room,
        lambda: machine.between_nodes(os.environ),
        lambda: services.wandb(wandb.mode, logged_in),
        lambda: services.slurm(os.environ, partition, trainer.devices, trainer.nodes),
    ]
