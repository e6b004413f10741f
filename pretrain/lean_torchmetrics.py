"""torchmetrics, which Lightning imports, without what it could use of other packages.

It imports transformers, torchvision, SciPy, Matplotlib and more wherever they are installed, for metrics of text, sound and
images: a third of the seconds until a run's first step. Nothing here uses them. While it is imported, it is told that there
are none; who asks it later gets the truth, but its metrics that stand on one of them fail.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

KEPT = ("torch", "numpy")


class LeanTorchmetrics(MetaPathFinder):
    """Finds torchmetrics as Python does, and loads it so."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torchmetrics" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_lean(module: ModuleType) -> None:
            with others_absent():
                load(module)

        spec.loader.exec_module = load_lean  # type: ignore[method-assign]
        return spec


@contextmanager
def others_absent() -> Iterator[None]:
    """While it lasts, Lightning's way of asking for packages says no to all but those that are needed."""
    from lightning_utilities.core import imports

    asked, available = imports.RequirementCache.__bool__, imports.package_available

    def is_needed(package: imports.RequirementCache) -> bool:
        name = re.match(r"[\w.-]*", str(package.requirement or package.module))
        return name is not None and name[0] in KEPT and asked(package)

    imports.RequirementCache.__bool__ = is_needed  # type: ignore[assignment,method-assign]
    imports.package_available = KEPT.__contains__  # type: ignore[assignment]
    try:
        yield
    finally:
        imports.RequirementCache.__bool__ = asked  # type: ignore[method-assign]
        imports.package_available = available


def import_lean() -> None:
    """From now on, in this process."""
    sys.meta_path.insert(0, LeanTorchmetrics())
