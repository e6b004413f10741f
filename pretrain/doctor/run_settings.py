"""What the run itself would refuse: the doctor builds what it would build, by the same code, and looks where it would
look."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import lease
from data.fault import Fault
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.run import checkpoints
from pretrain.run import folder as run_folder
from pretrain.training.even_shares import require_even


def check_settings(
    run: Path, config: Any, whole: Callable[[], Any] | None, build: Callable[[Any], object] | None
) -> list[Finding]:
    """Settings of a run ``config`` against each other and against what ``run`` holds.

    ``whole``: the configuration as the run has it, None where its data isn't given; ``build`` makes of that what the
    run would make.
    """
    uneven = _refusal(lambda: require_even(config, config.trainer.devices * config.trainer.nodes))
    findings = [
        uneven,
        _refusal(lambda: run_folder.allowed_changes(run, whole(), data=None)) if whole else None,
        _refusal(lambda: build(whole())) if whole and build and not uneven else None,
    ]
    found = [finding for finding in findings if finding]
    holder = lease.read_holder(run / lease.LEASE)
    if holder is not None and holder.is_gone() is False:
        found.append(failed("run", f"another job is writing to {run}: {holder}"))
    newest = checkpoints.newest(run)
    if newest is not None and (wrong := checkpoints.damage(newest)):
        found.append(warned("run", f"{wrong}{checkpoints.whole_before(newest)}: resume=previous goes on from there"))
    return found or [passed("run", "the settings fit each other" + (f", and go on from {newest}" if newest else ""))]


def _refusal(do: Callable[[], object]) -> Finding | None:
    try:
        do()
    except Fault as fault:
        return failed("run", str(fault))
    return None
