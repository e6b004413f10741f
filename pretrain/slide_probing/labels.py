"""What slides are labelled with: a table of the user's, as Patho-Bench, eva and CLAM write them too.

slide (slide_id, wsi_id, file)          a name in the store, also with the ending of its file; eva has a line a tile
label (target), or the column that label= names: classes, or a number
time, event                              survival: how long, and whether it ended with the event (1) or unseen (0);
                                         label=OS: the columns OS_days (_months, _years) and OS_event
patient (case_id, patient_id)            optional; slides of one patient are judged together, or are in one fold; an empty
                                         cell is filled in from TCGA's names, or refused
fold | split | fold_0, fold_1, …         optional: a number, train/test, or a column a round, as Patho-Bench has them

An empty cell or NaN is no label. NA, N/A, none and null are none beside numbers, and a class beside words, since a class
may be called so; which of both is said.

Patho-Bench's own file beside a table says more: see `pretrain.slide_probing.patho_bench`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.embeddings.slide_tables import (
    MAY_STAND_FOR_NOTHING,
    as_the_store_calls,
    column_of,
    empty_for_nothing,
    patient_by_name,
    read_slide_table,
)
from data.fault import Fault
from pretrain.slide_probing.measures import differ
from pretrain.slide_probing.patho_bench import TASK_FILE, SlideTask, as_code, task_beside

SIDES = {"train": 0, "val": 1, "tune": 1, "test": 2}
UNITS_OF_TIME = ("days", "months", "years", "time")
TRUTH = {"true": "1", "false": "0"}
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
ORDERED = 10  # classes: so many whole numbers at most are grades, more are a measurement
Round = tuple[np.ndarray, np.ndarray]
"""Numbers of the bags to fit on, and of those to judge by."""


@dataclass(frozen=True)
class LabelledSlides:
    """Bags of slides, one a case: a patient, or a slide. With what is asked of each."""

    bags: list[list[str]]
    names: list[str]  # of the cases
    patients: list[str]  # of each case: the cases of one are on one side of every round
    kind: str  # "classes", "number" or "survival"
    values: np.ndarray  # (n,) int64 class, (n,) float64, or (n, 2) float64 time and event
    classes: list[str]
    ordered: bool  # classes that are whole numbers
    rounds: list[Round] | None  # where the table says who is judged when
    said: list[str]  # sentences: what was left out, and how patients are known

    @property
    def strata(self) -> np.ndarray:
        """A class (n,) whose shares folds keep: the class, quarters of a number, the event."""
        if self.kind == "classes":
            return self.values
        if self.kind == "survival":
            return np.unique(self.values[:, 1], return_inverse=True)[1]
        quarters = np.digitize(self.values, np.quantile(self.values, (0.25, 0.5, 0.75)))
        return np.unique(quarters, return_inverse=True)[1]


@dataclass(frozen=True)
class _Row:
    slide: str
    patient: str  # empty where none is told
    answer: tuple[str, ...]  # the label, or time and event; empty strings where there is none
    sides: dict[str, str]  # who is judged when: what the columns for it say


def read_labels(table: Path, column: str | None, known: Mapping[str, int], cases: str | None = None) -> LabelledSlides:
    """Read a CSV, TSV or Parquet table; ``known`` are the store's slides with their numbers of tiles. ``cases``:
    what is judged, "patient" or "slide"; None: patients, unless Patho-Bench says slides. Raises Fault, naming what is
    wrong and where."""
    columns, lines = read_slide_table(table)
    task = task_beside(table)
    if task is not None and (task.column not in columns or column not in (None, task.column)):
        task = None  # it is another table's, or about another column
    slide_column, patient_column, asked = _columns(table, columns, task.column if task else column)
    sides = _side_columns(table, columns)
    rows = _rows(table, lines, slide_column, patient_column, asked, sides, known)
    rows, about_words = _without_words_for_nothing(table, rows, task)
    kept, said = _judgeable(table, rows, slide_column, known)
    by_slide = cases == "slide" or (cases is None and task is not None and task.by_slide)
    kept, who = _who_belongs_together(table, kept, patient_column, by_slide)
    said += [*about_words, who]
    if task is not None:
        said.append(f"{TASK_FILE} beside {table} says what is asked, {task.column}, and of whom")
    members: dict[str, list[_Row]] = {}
    for row in kept:
        first = members.setdefault(row.slide if by_slide else row.patient, [])
        if first and first[0].answer != row.answer:
            raise Fault(
                f"{table} says two things of patient {row.patient}: {' '.join(first[0].answer)} ({first[0].slide}) and"
                f" {' '.join(row.answer)} ({row.slide}): slides of a patient are judged together, so they have one label;"
                " leave some out, or 'pretrain probe slide cases=slide' judges each by itself."
            )
        first.append(row)
    answers = {some[0].slide: some[0].answer for some in members.values()}
    kind, values, classes, ordered = _values(table, asked, answers, task)
    patients = [some[0].patient for some in members.values()]
    return LabelledSlides(
        bags=[[row.slide for row in some] for some in members.values()],
        names=list(members),
        patients=patients,
        kind=kind,
        values=values,
        classes=classes,
        ordered=ordered,
        rounds=_rounds(table, sides, kept, patients),
        said=said,
    )


def _columns(table: Path, columns: Sequence[str], label: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """The columns of slides, of patients if there is one, and of what is asked."""
    times = [f"{label}_{unit}" for unit in UNITS_OF_TIME if f"{label}_{unit}" in columns]
    survival = (times[0], f"{label}_event") if times and f"{label}_event" in columns else None
    if label is not None and label not in columns and not survival:
        raise Fault(f"{table} has no column {label!r} (it has {', '.join(columns)}): name one of them, label=….")
    slide = column_of("slide", columns)
    label = label or column_of("label", columns)
    time, event = (column_of(name, columns) for name in ("time", "event"))
    if label in (None, time) and time and event:
        survival = (time, event)
    if slide is None or (label is None and not survival):
        raise Fault(
            f"{table} has the columns {', '.join(columns)}: it needs slide and label, or slide, time and event; label=…"
            " names another column."
        )
    return slide, column_of("patient", columns), survival or (str(label),)


def _side_columns(table: Path, columns: Sequence[str]) -> list[str]:
    """The columns that say who is judged when."""
    by_round = [name for name in columns if name.lower().startswith("fold_") and name[5:].isdigit()]
    names = sorted(by_round, key=lambda name: int(name[5:])) or [
        name for kind in ("split", "fold") if (name := column_of(kind, columns))
    ]
    if len(names) > 1 and not by_round:
        raise Fault(f"{table} has the columns split and fold, which say two things: leave one out.")
    return names


def _rows(
    table: Path,
    lines: Sequence[dict[str, str]],
    slide_column: str,
    patient_column: str | None,
    asked: Sequence[str],
    sides: Sequence[str],
    known: Mapping[str, int],
) -> list[_Row]:
    """A row a slide, though a table may have a line for each of its tiles."""
    rows: dict[str, _Row] = {}
    for number, line in enumerate(lines, start=2):
        slide = as_the_store_calls(empty_for_nothing(line[slide_column]), known)
        if not slide:
            raise Fault(f"{table} names no slide in line {number}: fill it in, or remove the line.")
        patient = empty_for_nothing(line[patient_column]) if patient_column else ""
        told = {name: empty_for_nothing(line[name]) for name in sides}
        row = _Row(slide, patient, tuple(line[name] for name in asked), told)
        if rows.setdefault(slide, row) != row:
            raise Fault(
                f"{table} has {slide} twice, the second time in line {number}, and says other things: remove one."
            )
    return list(rows.values())


def _judgeable(
    table: Path, rows: Sequence[_Row], slide_column: str, known: Mapping[str, int]
) -> tuple[list[_Row], list[str]]:
    """Rows with a label and a slide with tiles in the store, and sentences about the others."""
    empty = [row.slide for row in rows if all(row.answer) and known.get(row.slide) == 0]
    unlabelled = [row.slide for row in rows if not all(row.answer)]
    unknown = [row.slide for row in rows if all(row.answer) and row.slide not in known]
    kept = [row for row in rows if all(row.answer) and known.get(row.slide)]
    if not rows:
        raise Fault(f"{table} has the names of its columns and no line: give a line for each slide.")
    if not kept and unlabelled and not unknown and not empty:
        raise Fault(f"{table} has a label of no slide ({_some(unlabelled)}, say): fill the labels in.")
    if not kept:
        raise Fault(
            f"none of the slides of {table} is in the store with a label ({_some(unknown)}, say; the store has"
            f" {_some(sorted(known))}): the column {slide_column} must have the store's names."
        )
    sentences = (
        (unlabelled, f"of {table} without a label left out"),
        (unknown, f"of {table} not in the store left out"),
        (empty, f"of {table} without a tile left out"),
        (
            sorted({slide for slide in known if known[slide]} - {row.slide for row in rows}),
            f"of the store without a line in {table} left out",
        ),
    )
    return kept, [f"{_count(slides)} {what}" for slides, what in sentences if slides]


def _without_words_for_nothing(
    table: Path, rows: Sequence[_Row], task: SlideTask | None
) -> tuple[list[_Row], list[str]]:
    """Rows with an empty answer where a word like NA is none, and sentences about such words: among numbers and
    Patho-Bench's codes it is none, among words it may be a class, and is one."""
    found = [row for row in rows if any(one.lower() in MAY_STAND_FOR_NOTHING for one in row.answer)]
    if task is not None and task.classes:
        found = [row for row in found if as_code(row.answer[0]) not in task.classes]
    if not found:
        return list(rows), []
    others = {one for row in rows for one in row.answer if one and one.lower() not in MAY_STAND_FOR_NOTHING}
    words = ", ".join(
        sorted({f"'{one}'" for row in found for one in row.answer if one.lower() in MAY_STAND_FOR_NOTHING})
    )
    slides = _count([row.slide for row in found])
    coded = (task is not None and bool(task.classes)) or len(found[0].answer) == 2
    if not coded and not all(NUMBER.fullmatch(one) or _is_number(one) for one in others):
        return list(rows), [
            f"{words} in {table} is taken for a class, {slides}: where it means no label, empty the cell"
        ]
    left_out = {row.slide for row in found}
    return [
        replace(row, answer=tuple(empty_for_nothing(one) for one in row.answer)) if row.slide in left_out else row
        for row in rows
    ], [f"{words} in {table} is taken for no label, {slides}, as the others are numbers: to keep it, write one there"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _who_belongs_together(
    table: Path, rows: Sequence[_Row], patient_column: str | None, by_slide: bool
) -> tuple[list[_Row], str]:
    """Rows with a patient each, the slide where none is known, and how these are known. Raises Fault where a column
    tells some slides' patients, and neither it nor the name tells another's."""
    named = {row.slide: patient_by_name(row.slide) for row in rows}
    empty = [row.slide for row in rows if not row.patient]
    told: dict[str | None, set[str]] = {}  # by the patient of the name: what the column says of this one's slides
    for row in rows:
        told.setdefault(named[row.slide], set()).update({row.patient} - {""})
    by_column = len(empty) < len(rows)
    if by_column and (unknown := [slide for slide in empty if named[slide] is None or len(told[named[slide]]) > 1]):
        raise Fault(
            f"{table} leaves the column {patient_column} empty for {_count(unknown)}, whose names tell no patient: fill"
            " it in, with the slide's own name where it stands for itself, or leave the column out."
        )
    whole = [
        replace(row, patient=row.patient or next(iter(told[name]), None) or name or row.slide)
        if (name := named[row.slide])
        else replace(row, patient=row.patient or row.slide)
        for row in rows
    ]
    how = (
        "slides are judged one by one, a patient's in one fold"
        if by_slide
        else "slides of a patient are judged together"
    )
    if by_column:
        filled = f", and TCGA's names for {_count(empty)} without an entry there" if empty else ""
        return whole, f"{how}, by the column {patient_column}{filled}"
    nothing_there = "" if patient_column is None else f", as the column {patient_column} is empty"
    if any(named.values()):
        return whole, f"{how}, by TCGA's names{nothing_there}"
    return (
        whole,
        f"each slide stands for itself{nothing_there}: where a patient has several, name them in a column patient",
    )


def _values(
    table: Path, asked: Sequence[str], told: Mapping[str, tuple[str, ...]], task: SlideTask | None
) -> tuple[str, np.ndarray, list[str], bool]:
    """Kind, values, classes, and whether these have an order; ``told``: what is asked, by each case's first slide."""
    answers = list(told.values())
    if task is not None and task.classes:
        codes = [as_code(answer[0]) for answer in answers]
        if unknown := sorted(set(codes) - set(task.classes)):
            raise Fault(f"{table} has {unknown[0]} in {task.column}, and {TASK_FILE} beside it says of no such class.")
        classes = [name for code, name in task.classes.items() if code in set(codes)]
        answers = [(task.classes[code],) for code in codes]
        return "classes", _codes(table, answers, classes), classes, task.ordered and len(classes) > 2
    if len(asked) == 2:
        return "survival", _survival(table, asked, told), [], False
    numbers = None
    try:
        numbers = np.array(answers, dtype=np.float64)
    except ValueError as error:
        if all(NUMBER.fullmatch(answer[0]) for answer in answers):
            slide, (text,) = next((slide, answer) for slide, answer in told.items() if "," in answer[0])
            raise Fault(
                f"{table} writes numbers with a comma ({text} of {slide}): write a point for it, {text.replace(',', '.')}."
            ) from error
    if numbers is not None:
        whole, different = (numbers == numbers.round()).all(), len(np.unique(numbers))
        if not np.isfinite(numbers).all():
            slide = next(slide for slide, number in zip(told, numbers, strict=True) if not np.isfinite(number[0]))
            raise Fault(f"{table} has a label that isn't finite, {told[slide][0]} of {slide}: mend it.")
        if different == 1:
            raise Fault(f"all labels of {table} are {numbers[0, 0]:g}: there is nothing to tell apart.")
        if not (whole and different <= ORDERED):
            return "number", numbers[:, 0], [], False
        answers = [(f"{value:g}",) for value in numbers[:, 0]]  # 1.0 is 1
        classes = sorted({answer[0] for answer in answers}, key=float)
    else:
        classes = sorted({answer[0] for answer in answers})
    return "classes", _codes(table, answers, classes), classes, numbers is not None and len(classes) > 2


def _survival(table: Path, asked: Sequence[str], told: Mapping[str, tuple[str, ...]]) -> np.ndarray:
    """(n, 2) time and event; ``told``: both as they are written, by slide."""
    numbers = np.zeros((len(told), 2))
    for row, (slide, (time, event)) in zip(numbers, told.items(), strict=True):
        try:
            row[1] = float(TRUTH.get(event.lower(), event))
        except ValueError:
            row[1] = np.nan
        if row[1] not in (0, 1):
            raise Fault(
                f"{table} has {asked[1]}={event} for {slide}: an event is 1 (or true), or 0 (or false: not seen while it"
                " was looked for)."
            )
        try:
            row[0] = float(time)
        except ValueError as error:
            comma = f": write {time.replace(',', '.')}" if NUMBER.fullmatch(time) else ": mend it"
            raise Fault(f"{table} has {asked[0]}={time} for {slide}, which is no number{comma}.") from error
        if not (np.isfinite(row[0]) and row[0] >= 0):
            raise Fault(f"{table} has {asked[0]}={time} for {slide}: a time is a number from 0 on.")
    if numbers[:, 1].sum() < 2:
        raise Fault(f"{table} has {numbers[:, 1].sum():.0f} events: nobody can be compared; give more slides.")
    if not differ("survival", numbers):
        raise Fault(f"{table} has no two cases of whom it is known who came first: give other times.")
    return numbers


def _codes(table: Path, answers: Sequence[tuple[str, ...]], classes: list[str]) -> np.ndarray:
    """Numbers (n,) of the ``classes`` that are the answers."""
    if len(classes) < 2:
        raise Fault(f"all labels of {table} are {classes[0]}: there is nothing to tell apart.")
    codes = np.array([classes.index(answer[0]) for answer in answers])
    if (np.bincount(codes) < 2).any():
        rare = classes[int(np.bincount(codes).argmin())]
        raise Fault(f"{table} has one case only of {rare}: it can't be both learned and judged; leave it out.")
    return codes


def _rounds(table: Path, names: Sequence[str], rows: Sequence[_Row], patients: Sequence[str]) -> list[Round] | None:
    """Who is judged when, where columns ``names`` say it: by a split, by a number of fold, or by a column a round;
    ``patients`` are those of the cases."""
    rounds: list[Round] = []
    for name in names:
        told: dict[str, str] = {}
        for row in rows:
            if told.setdefault(row.patient, row.sides[name]) != row.sides[name]:
                both = " and ".join(sorted({told[row.patient], row.sides[name]}))
                raise Fault(
                    f"{table}: patient {row.patient} is in {name} {both}: what is judged must not have been"
                    " learned; put all slides of a patient on one side."
                )
        if lacking := next((patient for patient, side in told.items() if not side), None):
            raise Fault(f"{table} leaves {name} empty for {lacking}: fill it in.")
        side = np.array([told[patient] for patient in patients])
        if name.lower() == "fold":
            rounds += [(np.flatnonzero(side != one), np.flatnonzero(side == one)) for one in sorted(set(side.tolist()))]
        else:
            if other := sorted({one for one in side.tolist() if one.lower() not in SIDES}):
                raise Fault(f"{table}: column {name} says {other[0]!r}: it may say train, val (or tune) and test.")
            part = np.array([SIDES[one.lower()] for one in side.tolist()])
            # Where nothing is kept for a test, as in eva's tables, what is kept for validation is judged.
            rounds.append((np.flatnonzero(part < part.max()), np.flatnonzero(part == part.max())))
            if part.max() == part.min():
                only = side[0].lower()
                lacking_side = "train" if part.max() else "test, or val"
                raise Fault(f"{table}: column {name} says {only} of all: some must be {lacking_side}.")
    return rounds or None


def _count(slides: list[str]) -> str:
    return f"1 slide ({slides[0]})" if len(slides) == 1 else f"{len(slides)} slides ({slides[0]}, …)"


def _some(names: Sequence[str]) -> str:
    return names[0] if names else "nothing"
