"""The command's front door: check that the house is ours, then hand over to `launch`.

The four packages keep short names (``data``, ``models``, ``launch``, ``pretrain``), so another installed distribution
may shadow one of them. That is looked for here, before anything of theirs is imported, because the failure would
otherwise be an obscure ImportError somewhere else.
"""

import ctypes
import importlib
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from pretrain.console import Unfailing
from pretrain.lean_torchmetrics import import_lean
from pretrain.overview import said_at_once
from pretrain.run import signals

ROOT = Path(__file__).resolve().parent.parent


def shadowed(root: Path = ROOT) -> str | None:
    """One sentence naming a package of ours that Python would take from somewhere else, or None."""
    for name in ("data", "models", "launch"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or root / name != found.parent:
            return (
                f"Python finds the package '{name}' at {found or 'no place'} instead of {root / name}: another"
                " installed distribution (or a folder on PYTHONPATH) shadows it. Install Slidewright in an environment"
                " of its own, or remove the other one."
            )
    return None


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for what is allocated next; other C libraries are left as they are.

    By itself it gives a large tensor's memory back to the system, which clears every page of it for the next step's.
    """
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as malloc.h numbers them
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def main() -> None:
    """Run ``pretrain <command> [key=value …]``."""
    if problem := shadowed():
        sys.exit(f"pretrain: {problem}")
    sys.stderr = Unfailing(sys.stderr)  # type: ignore[assignment]
    if text := said_at_once(sys.argv[1:]):
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    trains = sys.argv[1:2] in (["tile"], ["slide"])
    if trains:  # what trains answers a signal; before its imports, which take seconds
        signals.listen()
    else:
        signals.hear()
    if sys.argv[1:2] == ["tile"]:
        # Large tensors on huge pages: a CPU's step is 3 % shorter (a slide's attention would be longer by a fifth).
        # torch reads this at its first allocation.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        keep_freed_memory()
    import_lean()
    entry = importlib.import_module("launch.entry")
    sys.excepthook = entry.say_defect
    warnings.showwarning = entry.show_warning
    try:
        entry.run_command_line(sys.argv[1:])
    finally:
        if trains:
            signals.ignore()


if __name__ == "__main__":
    main()
