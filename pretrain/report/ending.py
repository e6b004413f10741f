"""How a run ended that didn't reach its last step, and which of its steps weren't taken: what a failed run's page begins
with."""

import json
import shlex
from typing import Any

from data.lease import LEASE, Holder, read_holder
from pretrain.pages import page
from pretrain.pages.page import Section
from pretrain.report.parts import ReportedRun, last_step
from pretrain.run import checkpoints
from pretrain.run.folder import REPLAY

TILES_LISTED = 8  # of a replay


def ending_section(run: ReportedRun, anchor: str) -> Section | None:
    """What stopped a run, where it stood, the steps that it skipped, what replays of them found, and what to do; None
    of a run that has nothing of it."""
    ended_by, skipped = last_error(run), skipped_steps(run)
    optim = run.config.get("optim")
    steps, newest = optim.get("steps") if isinstance(optim, dict) else None, checkpoints.newest(run.folder)
    open_end = not ended_by and isinstance(steps, int) and last_step(run) < steps
    if not ended_by and not skipped and not open_end:
        return None
    rows = [("ended by", ended_by)] if ended_by else []
    rows.append(
        ("steps on record", f"{last_step(run):,} of {steps:,}" if isinstance(steps, int) else f"{last_step(run):,}")
    )
    rows.append(("newest checkpoint", f"step {checkpoints.step_of(newest):,}" if newest else "none"))
    rows += [(f"alarm at step {alarm['step']:,}", f"{alarm['alarm']}: {alarm['says']}") for alarm in run.alarms[-1:]]
    if skipped:
        count = int(run.metrics["skipped"][1][-1])
        rows.append(("steps skipped", f"{count:,}, the last one {skipped[-1]:,}: something wasn’t finite"))
    found = replays(run)
    holder = read_holder(run.folder / LEASE) if open_end else None
    gone = holder.is_gone() if holder else open_end
    words = words_on_an_open_end(holder, gone) if open_end else words_on_going_on(bool(ended_by), newest is not None)
    body = page.paragraph(words) + page.fact_list(rows)
    if open_end and gone is not False and (again := last_start(run).get("command")):
        does = "goes on from the newest checkpoint" if newest else "begins anew, since there is no checkpoint"
        body += page.missing([(f"The same command {does}:", shlex.join(map(str, again)))])
    body += "".join(replay_facts(one) for one in found)
    kept = {checkpoints.step_of(path) + 1 for path in checkpoints.complete(run.folder / REPLAY)}
    if open_ones := sorted(kept - {one["step"] for one in found}):
        command = f"pretrain tile run={run.folder} replay={open_ones[-1]}"
        body += page.missing([("Which tile and which term of the loss did it:", command)])
    title = "How it ended" if ended_by or gone else "How far it is" if open_end else "Steps not taken"
    return Section(anchor, title, body)


def last_error(run: ReportedRun) -> str:
    """What the last start of a run ended by, if it was an error; else nothing."""
    return str(last_start(run).get("ended_by") or "")


def last_start(run: ReportedRun) -> dict[str, Any]:
    """What is on record of the last start of a run; nothing where there is no record."""
    found: dict[str, Any] = (run.provenance.get("starts") or [{}])[-1]
    return found


def words_on_an_open_end(holder: Holder | None, gone: bool | None) -> str:
    """What is known of a run that has steps to go and no error on record: who is killed leaves its lease behind, who is
    told to stop gives it up. ``gone``: whether its holder is; None where that can't be told from this machine."""
    if holder is None:
        known = "nobody holds its folder: it was told to stop, or this is a copy of it."
    elif gone is None:
        known = f"its folder was held by {holder}: it still runs there, or was killed."
    else:
        known = f"who held its folder is gone, {holder}: it was killed."
    if gone is False:
        return f"This run goes on now: its folder is held by {holder}."
    return f"This run has steps to go. No end is on record, and {known}"


def words_on_going_on(failed: bool, has_checkpoint: bool) -> str:
    """What the same command does now."""
    if not failed:
        return "Some steps of this run weren’t taken; it went on behind them."
    goes_on = "goes on from the newest checkpoint" if has_checkpoint else "begins anew, since there is no checkpoint"
    return (
        f"The last start of this run ended before its last step. Once its cause is mended, the same command {goes_on}."
    )


def skipped_steps(run: ReportedRun) -> list[int]:
    """The steps on record that weren't taken: those at which the count of skipped ones rises."""
    if "skipped" not in run.metrics:
        return []
    steps, counts = run.metrics["skipped"]
    before = [0, *counts[:-1].tolist()]
    return [int(step) for step, now, was in zip(steps.tolist(), counts.tolist(), before, strict=True) if now > was]


def replays(run: ReportedRun) -> list[dict[str, Any]]:
    """What 'pretrain tile run=… replay=…' found of its steps, oldest first; a damaged file is passed over."""
    found = []
    for path in sorted((run.folder / REPLAY).glob("step-*.json")):
        try:
            one = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int):
            found.append(one)
    return found


def replay_facts(one: dict[str, Any]) -> str:
    """What a replay found, as a list."""
    what = f"the gradient of {', '.join(one['networks'])}" if one.get("networks") else "the loss"
    rows = [
        ("not finite", f"{what}, in {one.get('precision')}"),
        ("terms", ", ".join(one.get("terms") or ["none by itself"])),
    ]
    if one.get("began"):
        rows.append(("first layer", str(one["began"])))
    tiles = [" with ".join(str(tile["tile"]) for tile in together) for together in one.get("tiles", [])]
    rows.append(("tiles", "; ".join(tiles[:TILES_LISTED]) or "none in particular: others in their place do it too"))
    return page.paragraph(f"Step {one['step']:,}, computed again:") + page.fact_list(rows)
