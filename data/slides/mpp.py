"""What a user says of slides' microns per pixel, ``slides_mpp=``: one value for all, or a table by slide. It overrules
what a slide says."""

from dataclasses import dataclass, field
from pathlib import Path

from data.fault import Fault
from data.slides.lists import MPP_COLUMNS, PATH_COLUMNS, TABLES, read_table
from data.stated_numbers import decimal

SAME_MPP = 1e-4  # but for rounding
ISOTROPIC = 0.01  # by how much a pixel's sides may differ
FINEST, COARSEST = 0.05, 10.0  # µm per level-0 pixel: finer is no light microscope's, coarser is a picture of a slide
SLIDE_COLUMNS = (*PATH_COLUMNS, "slide_id", "slide_name", "name", "id")


@dataclass(frozen=True)
class SlidesMpp:
    """Microns per level-0 pixel: ``one`` for every slide, or ``by_slide``, under a slide's path, its file's name, or
    that without its ending; ``given`` is the setting as the user gave it, empty where that is nothing."""

    given: str = ""
    one: float | None = None
    by_slide: dict[str, frozenset[float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: str | float | None) -> "SlidesMpp":
        """``None``, a number, or the path of a table with a column of slides and one called mpp. Raises Fault for
        anything else, and for values that no slide has."""
        if given is None:
            return cls()
        if Path(str(given)).suffix.lower() in TABLES:
            return cls(str(given), by_slide=_by_slide(Path(str(given)).expanduser()))
        try:
            return cls(f"{decimal(str(given)):g}", _plausible(decimal(str(given)), "slides_mpp="))
        except ValueError as error:
            raise Fault(
                f"slides_mpp={given} is neither a number of microns nor a table (.csv) with the columns slide and mpp"
            ) from error

    def of(self, slide: Path) -> float | None:
        """What counts for a slide's file, or None where nothing is said about it. Raises Fault where several values
        are."""
        if self.one is not None:
            return self.one
        for name in (str(slide), slide.name, slide.stem):
            if found := self.by_slide.get(name):
                if len(found) > 1:
                    raise Fault(
                        f"{self.given} gives {slide} several µm per pixel"
                        f" ({', '.join(f'{value:g}' for value in sorted(found))}): name it by its path"
                    )
                return next(iter(found))
        return None

    def tells_of(self, slides: list[Path]) -> str:
        """A sentence where a table tells of some of the slides only, or nothing. Raises Fault where it tells of
        none."""
        told = sum(self.of(slide) is not None for slide in slides) if self.by_slide else len(slides)
        if slides and self.given and not told:
            raise Fault(
                f"slides_mpp={self.given} tells of none of the slides: its column of slides holds their names or paths"
            )
        return (
            f"{self.given} tells of {told} of {len(slides)} slides; the rest is taken as it says itself"
            if told < len(slides)
            else ""
        )


def _by_slide(table: Path) -> dict[str, frozenset[float]]:
    if not table.is_file():
        raise Fault(f"slides_mpp={table}: there is no such table")
    header, *rows = read_table(table)
    names = [name.lower() for name in header]
    slide, mpp = (
        next((names.index(name) for name in known if name in names), None) for known in (SLIDE_COLUMNS, MPP_COLUMNS)
    )
    if slide is None or mpp is None:
        raise Fault(
            f"slides_mpp={table} needs a column called slide (names or paths) and one called mpp; it has"
            f" {', '.join(header)}"
        )
    said_too = [column for column, name in enumerate(names) if name in (*MPP_COLUMNS, "mpp_y") and column != mpp]
    found: dict[str, frozenset[float]] = {}
    for row in rows:
        if not row[mpp]:
            continue  # nothing is said about this one
        value, *others = (_number(table, row, slide, header, column) for column in (mpp, *said_too) if row[column])
        if any(abs(other / value - 1) > ISOTROPIC for other in others):
            several = ", ".join(f"{header[column]} = {row[column]}" for column in (mpp, *said_too) if row[column])
            raise Fault(
                f"{table} says {several} of {row[slide]}, and pixels that are not square are not tiled: leave one"
                " column that counts"
            )
        path = Path(row[slide])
        for name in {str(path.absolute()), path.name, path.stem, row[slide]}:
            found[name] = found.get(name, frozenset()) | {value}
    return found


def _number(table: Path, row: list[str], slide: int, header: list[str], column: int) -> float:
    try:
        return _plausible(decimal(row[column]), f"{table}, {row[slide]}: ")
    except ValueError as error:
        raise Fault(
            f"{table} says {header[column]} = {row[column]!r} of {row[slide]}, where a number belongs"
        ) from error


def _plausible(value: float, where: str) -> float:
    if not FINEST <= value <= COARSEST:
        raise Fault(f"{where}{value:g} is not allowed: a slide's pixels are {FINEST:g} to {COARSEST:g} µm wide")
    return value
