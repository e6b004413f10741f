"""``launch.array=40``: which commands can be shared by many jobs, and what merges what their parts made."""

import re

from data.fault import Fault
from pretrain.settings.composition import Composed, of_the_command_line


@of_the_command_line()
def merging(composed: Composed) -> list[str] | None:
    """The words of the command that merges a command's parts, or None where nothing is to be merged.

    Raises Fault for a command that has no parts.
    """
    if "part" not in composed.tree:
        raise Fault(
            f"launch.array= is for commands that take part=, 'shard' and 'embed', and not for {composed.command!r}."
        )
    if composed.tree.part is not None:
        raise Fault("launch.array= gives every job its part=: leave part= out.")
    given = [match[1] for word in composed.words if (match := re.fullmatch(r"[+]*(out=.*)", word, re.DOTALL))]
    if not given:
        raise Fault("launch.array= needs out= on the command line: it is where the job that merges looks.")
    out = given[-1]  # quoted as the user did
    if composed.command == "shard":
        return ["shards", "index", f"shards={out.removeprefix('out=')}"]
    return ["embed", out, "merge=true"] if composed.tree.stage == "tile" else None
