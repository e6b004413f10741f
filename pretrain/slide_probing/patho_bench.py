"""What Patho-Bench says of a task, in a file beside its table: what is asked, and what its codes stand for.

task_col: OS                      the column of the labels; of survival OS_event and OS_days lie beside it
task_type: survival               or classification
label_dict: {0: low, 1: high}     what codes stand for
metrics: [weighted_kappa]         where classes have an order; otherwise macro-ovr-auc, bacc or cindex
sample_col: slide_id              what is judged: each slide, or case_id
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.fault import Fault

TASK_FILE = "config.yaml"


@dataclass(frozen=True)
class SlideTask:
    """``classes``: their names by code as `as_code` writes it, in Patho-Bench's order; none for survival."""

    column: str
    classes: dict[str, str]
    ordered: bool
    by_slide: bool


def task_beside(table: Path) -> SlideTask | None:
    """What the file beside a table says, None where there is none of a task. Raises Fault where it is damaged."""
    path = table.parent / TASK_FILE
    text = path.read_text(errors="replace") if path.is_file() else ""
    if "task_col:" not in text:
        return None
    try:
        found = yaml.safe_load(text)
        names = found.get("label_dict") or {}
        classes = {as_code(code): str(name) for code, name in names.items()} if isinstance(names, Mapping) else {}
        return SlideTask(
            column=str(found["task_col"]),
            classes={} if found.get("task_type") == "survival" else classes,
            ordered="weighted_kappa" in (found.get("metrics") or []),
            by_slide=found.get("sample_col") == "slide_id",
        )
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise Fault(
            f"{path} can't be read as a task of Patho-Bench ({' '.join(str(error).split())}): mend it, or put the table"
            " elsewhere."
        ) from error


def as_code(value: object) -> str:
    """A code as it is compared: 1.0 is 1."""
    try:
        return f"{float(str(value)):g}"
    except ValueError:
        return str(value).strip()
