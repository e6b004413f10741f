"""Is the folder that a run writes to fit? Written, renamed, seen by other processes and nodes, and with room for
checkpoints."""

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from data.files import Refused, remove, write_whole
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.objectives.interface import Objective

FILE_APPEARS_WITHIN = (
    60  # that another node's file may take to appear; caches of network file systems hold names for some seconds
)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def write_and_rename(folder: Path) -> list[Finding]:
    """Write a file as all that must be whole is written (flush, rename), and read it in another process."""
    place = existing(folder)
    file, content = place / f".doctor-{os.getpid()}-{secrets.token_hex(4)}", secrets.token_hex(512)
    try:
        write_whole(file, content)
        reader = [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", str(file)]
        seen = subprocess.run(reader, capture_output=True, text=True).stdout.strip()
    except Refused as refusal:
        return [
            failed(
                "folder",
                f"{place} can't be written ({refusal.__cause__}): give a run= on a disk that this user may write to",
            )
        ]
    finally:
        remove(file)
    if seen != content:
        return [
            failed(
                "folder",
                f"what is written to {place} is not what another process reads there: give a run= on another file"
                " system",
            )
        ]
    return [passed("folder", f"{place}: written, renamed, and read by another process")]


def links_and_locks(folder: Path) -> list[Finding]:
    """Which of hard links, symbolic links and locks the file system has: none is needed, and what stands in for it is
    said."""
    place, name = existing(folder), f".doctor-{os.getpid()}-{secrets.token_hex(4)}"
    file, link = place / name, place / f"{name}-link"
    lacks = []
    try:
        file.touch()
        for try_it, instead in (
            (lambda: os.link(file, link), "hard links (who holds a folder is written in two steps)"),
            (lambda: link.symlink_to(name), "symbolic links (checkpoints/best is a file with a name in it)"),
            (lambda: _lock(file), "locks by flock (nothing here uses them; other programs on this disk may)"),
        ):
            try:
                try_it()
            except OSError:
                lacks.append(instead)
            remove(link)
    except OSError:
        return []  # nothing can be written there, as `write_and_rename` says
    finally:
        remove(file)
    if lacks:
        return [passed("links", f"{place} has no {', no '.join(lacks)}: a run needs none of it")]
    return [passed("links", f"{place} has hard links, symbolic links and locks, and a run needs none of them")]


def _lock(file: Path) -> None:
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def seen_by_all_nodes(
    folder: Path, environment: Mapping[str, str], seconds: float = FILE_APPEARS_WITHIN
) -> list[Finding]:
    """On every node of a SLURM job at once: do the nodes see each other's files? Nothing on one node."""
    nodes, own = int(environment.get("SLURM_NNODES", 1)), int(environment.get("SLURM_NODEID", 0))
    if nodes == 1:
        return []
    place = existing(folder)
    name = f".doctor-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_STEP_ID', 0)}"
    (place / f"{name}-here-{own}").touch()
    missing = _wait(place, f"{name}-here", nodes, seconds)
    (place / f"{name}-seen-{own}").touch()
    if own == 0:  # which sweeps up, once all have looked
        _wait(place, f"{name}-seen", nodes, seconds)
        for path in place.glob(f"{name}-*"):
            path.unlink(missing_ok=True)
    if missing:
        who = ", ".join(map(str, missing))
        return [
            failed(
                "folder",
                f"node {own} doesn't see in {place} what node {who} of the job writes there: give a run= on a file"
                " system that all nodes share",
            )
        ]
    return [passed("folder", f"{place} is one folder on all {nodes} nodes")]


def _wait(place: Path, name: str, nodes: int, seconds: float) -> list[int]:
    """The nodes whose file hasn't appeared when the time is over."""
    end = time.monotonic() + seconds
    while missing := [node for node in range(nodes) if not (place / f"{name}-{node}").exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
        os.scandir(place).close()  # some network file systems look again only then
    return missing


def checkpoint_bytes(objective: Objective) -> int:
    """Bytes of a checkpoint: every parameter and buffer, and AdamW's two moments of those that are trained."""
    whole = sum(tensor.numel() * tensor.element_size() for tensor in objective.state_dict().values())
    trained = [p for network in objective.trained().values() for p in network.parameters() if p.requires_grad]
    return whole + sum(2 * p.numel() * p.element_size() for p in trained)


def check_room(folder: Path, each: int, kept: int, steps: int, checkpoint_every: int) -> list[Finding]:
    """Is there room for the checkpoints that a run keeps, the best one, and the one being written?"""
    place = existing(folder)
    count = (kept or -(-steps // checkpoint_every)) + 2
    free, needed = shutil.disk_usage(place).free, each * count
    what = (
        f"{count} checkpoints of {each / 1e9:,.2f} GB (those kept, the best one, one being written) need"
        f" {needed / 1e9:,.1f} GB, and {place} has {free / 1e9:,.1f} GB free"
    )
    if needed > free:
        return [
            failed("disk", f"{what}: free some, give a run= on a larger disk, or set trainer.keep_checkpoints lower")
        ]
    return [(warned if needed > free / 2 else passed)("disk", what)]


def built(make_objective: object) -> Objective:
    """The objective without memory for its numbers."""
    with torch.device("meta"):
        return make_objective()  # type: ignore[operator, no-any-return]
