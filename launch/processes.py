"""How many processes a command runs as, where ``launch.*`` and ``trainer.*`` both have a say."""

from dataclasses import dataclass

from data.fault import Fault
from pretrain.settings.composition import Composed, of_the_command_line


@dataclass(frozen=True)
class Processes:
    """``each`` processes on every one of ``nodes``, with ``gpus`` a node: as many as processes, or none."""

    nodes: int
    each: int
    gpus: int

    @property
    def count(self) -> int:
        return self.nodes * self.each


def trains(composed: Composed) -> bool:
    """Whether a command trains: those with settings ``trainer.*`` do, as several processes that act as one."""
    return "trainer" in composed.tree


def spreads(composed: Composed) -> bool:
    """Whether a command runs as several processes on several machines: what trains, and what has ``processes=``."""
    return trains(composed) or "processes" in composed.tree


def shared_by(composed: Composed) -> int:
    """How many processes share what a command does that doesn't train."""
    return composed.tree.get("processes_per_slide", composed.tree.get("processes", 1))


@of_the_command_line()
def arrange(composed: Composed, nodes: int, gpus: int | None, each: int | None) -> tuple[Processes, list[str]]:
    """The processes of a command, and the words of its command line with ``trainer.*`` set to match.

    Raises Fault where the settings contradict each other, or don't say enough.
    """
    if not spreads(composed):
        if nodes != 1 or each not in (None, 1):
            raise Fault(
                f"'pretrain {composed.command}' is one process: launch.nodes and launch.processes_per_node are for"
                " 'tile', 'slide' and 'curate'"
                f"{'; more machines take part with launch.array=' if 'part' in composed.tree else ''}."
            )
        return Processes(1, 1, gpus or 0), composed.words
    if gpus and each not in (None, gpus):
        raise Fault(
            f"launch.processes_per_node={each} contradicts launch.gpus_per_node={gpus}: a process runs on each GPU."
        )
    if not trains(composed):
        asked = composed.tree.processes
        found = Processes(nodes, gpus or each or max(1, asked // nodes), gpus or 0)
        if "processes" in composed.overridden and asked != found.count:
            raise Fault(
                f"processes={asked} contradicts launch.*, by which it is {found.count}: leave it out, launch sets it."
            )
        return found, [word for word in composed.words if not word.startswith("processes=")] + [
            f"processes={found.count}"
        ]
    trainer = composed.tree.trainer
    asked = {
        key: trainer[key] for key in ("nodes", "devices", "accelerator") if f"trainer.{key}" in composed.overridden
    }
    on_cpu = asked.get("accelerator") == "cpu"
    if gpus is None:
        if not on_cpu and each is None and "devices" not in asked:
            raise Fault(
                "launch.gpus_per_node must be given: a process trains on each; 0 is for CPUs, with"
                " launch.processes_per_node=."
            )
        gpus = 0 if on_cpu or each is not None else asked["devices"]
    each = gpus or each or asked.get("devices", 1)
    found = Processes(nodes, each, gpus)
    meant = {"nodes": nodes, "devices": each, "accelerator": "gpu" if gpus else "cpu"}
    for key, value in asked.items():
        if value not in (meant[key], "auto"):
            raise Fault(
                f"trainer.{key}={value} contradicts launch.*, by which it is {meant[key]}: leave it out, launch"
                " sets it."
            )
    return found, [
        *composed.words,
        *(f"trainer.{key}={value}" for key, value in meant.items() if asked.get(key) != value),
    ]


@of_the_command_line()
def refuse_uneven(composed: Composed, processes: int) -> None:
    """Raise Fault where a run can't be shared evenly by so many processes: they would find that out when they have
    started, a job when its turn comes."""
    if trains(composed):
        from pretrain.training.even_shares import require_even  # which imports Lightning and FSDP, for seconds

        require_even(composed.tree, processes)


@of_the_command_line()
def refuse_unshared(composed: Composed) -> None:
    """Raise Fault where a command's processes are to share slides, and what they don't fit can be told before they are
    started."""
    config = composed.object()
    if composed.command != "embed":
        return
    from pretrain.commands.embed import require_consistent  # which imports torch
    from pretrain.embedding.shared_slides import require_sharing

    require_consistent(config)
    require_sharing(config.checkpoint, config.allow_plugins)
