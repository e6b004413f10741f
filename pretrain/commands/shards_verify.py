"""Read tile shards whole and find everything that is wrong with them.

Held to checksums, to the index and to each other: tars that are missing, truncated, damaged, empty or not in the index;
tiles whose bytes have changed or that are no JPEG; JSON that is missing, damaged or says another place; an index or a
record that doesn't match its shard; coordinates that disagree. Each finding names the shard, the member and what it is.

The findings are listed for a person, and as JSON for a program. The exit code is 0 where nothing is wrong and 1
otherwise. Nothing is changed, and the shards may lie behind a URL. 'pretrain shard', run again, makes missing and
truncated shards of its own anew; delete a damaged one first.

Examples:

    pretrain shards verify shards=shards
    pretrain shards verify shards="/data/a /data/b" report=findings.json workers=8
    pretrain shards verify shards=s3://bucket/shards workers=16
    pretrain shards verify 'shards=/data/a/tiles-{000000..000123}.tar'
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from data.fault import Fault
from data.files import require_writable, write_whole
from data.parallel import in_processes
from data.redaction import redacted_settings
from data.remote import is_remote
from data.shards.named_tars import gap, named_tars, tars_among
from data.shards.verify import Defect, Folder, Verified, list_shards, verify_folder, verify_shard
from models.allowed import ON_DISK, SOME, within
from pretrain.run.progress import Progress, say

FINDINGS_SAID = 20  # findings of a folder that are said one by one; the report has them all


@dataclass
class Config:
    shards: Annotated[list[str], SOME]
    report: Annotated[str | None, ON_DISK]
    workers: Annotated[int | None, within(least=1)]


def run(config: Config) -> None:
    """Verify every folder, write the report, and raise a Fault where anything was found."""
    if config.report is not None:
        require_writable(Path(config.report))
    workers = config.workers or len(os.sched_getaffinity(0))
    asked = [(named, *of_folder) for named in config.shards for of_folder in named_tars(named).items()]
    folders = [
        verify(folder if is_remote(folder) else Path(folder), workers, tars, named) for named, folder, tars in asked
    ]
    found = sum(folder["found"] for folder in folders)
    report = json.dumps(redacted_settings({"ok": not found, "found": found, "folders": folders}), indent=1)
    if config.report is None:
        sys.stdout.write(report + "\n")
    else:
        write_whole(Path(config.report), report + "\n")
        say(f"the whole report: {config.report}")
    if found:
        named = f"{config.report} names them" if config.report else "the report names them"
        raise Fault(
            f"{found:,} {'thing is' if found == 1 else 'things are'} wrong with the shards in"
            f" {', '.join(config.shards)}; {named}"
        )


def verify(folder: Folder, workers: int, tars: list[str] | None = None, named: str = "") -> dict[str, Any]:
    """The report on one folder, or on those ``tars`` of it that are ``named``: what was there, how many findings of which
    kind, and each of them."""
    names = list_shards(folder)
    if tars is not None:
        names, lost = tars_among(tars, names)
        if lost:
            raise gap(named, lost, str(folder))
    results = [verify_folder(folder)]
    progress = Progress(len(names), f"verifying {folder}", "shards")
    said = 0
    try:
        for finding in results[0].findings:
            said = _say(finding, said)
        for name, result in in_processes(partial(verify_shard, folder), names, workers):
            if isinstance(result, Fault):  # the process died on it
                result = Verified(name, findings=[Defect(name, "", "unreadable", str(result))])
            results.append(result)
            for finding in result.findings:
                said = _say(finding, said)
            progress.advance(1, name)
    finally:
        progress.close()
    results.sort(key=lambda result: result.shard)
    findings = [finding for result in results for finding in result.findings]
    unnamed = sum(result.unnamed for result in results)
    kinds = Counter(finding.kind for finding in findings)
    tiles, size = sum(result.tiles for result in results), sum(result.size for result in results)
    counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) or "all is well"
    say(f"{folder}: {len(names):,} shards, {tiles:,} tiles, {size / 1e6:,.1f} MB read: {counted}")
    return {
        "folder": str(folder),
        "shards": len(names),
        "tiles": tiles,
        "bytes": size,
        "found": len(findings) + unnamed,
        "kinds": kinds,
        "findings": [asdict(finding) for finding in findings],
        "unnamed": unnamed,
    }


def _say(finding: Defect, said: int) -> int:
    if said < FINDINGS_SAID:
        member = f" {finding.member}:" if finding.member else ""
        say(f"{finding.shard}:{member} {finding.what}")
    elif said == FINDINGS_SAID:
        say("… and more, which are counted and in the report")
    return said + 1
