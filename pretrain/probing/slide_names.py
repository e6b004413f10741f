"""Which images are of one patient or slide, as far as their names say.

There is no one way in which tiles are named, so names are read in several ways, and each way takes the coarsest thing
that it can: groups that are too large cost nothing but choice, groups that are too small put one slide on both sides.

    patients     TCGA's, CPTAC's and GTEx's codes, anywhere in the path
    slide files  ``<slide>.svs``, ``<slide>.ndpi`` and so on inside a name, without what the class says again
    folders      the outermost one below the class that isn't a magnification, a part (train, test) or a word like
                 ``tiles``, without what the class says again; a guess where it has no number
    file names   what is left of a name without its place: the numbers at its end (places, sizes, levels,
                 magnifications, indices), parts of a slide (``annotation3``), dates, and words that all names share

Folders and file names that group by each other's parts are taken together. Where they cut across each other, one of
them is wrong: then whatever either joins stays together, and it is a guess. So it is where an inner folder or the end
of a name comes again in several outer ones: ``HE/S1`` and ``KI67/S1``, ``orig_S1`` and ``blur_S1`` may be of one slide
S1. Copies that no name tells are found by their looks, in `pretrain.probing.slide_groups`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.probing.grouping import Groups, joined, numbered

PATIENT_CODE = re.compile(
    r"(?<![A-Z0-9])(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5}|GTEX-[A-Z0-9]{4,5})(?![A-Z0-9])", re.IGNORECASE
)
PATIENT_WORD = re.compile(r"(patient|pat|pt|subject|subj|donor|case)(\d*)", re.IGNORECASE)
SLIDE_FILE = re.compile(r"([^/]+?)\.(?:svs|ndpis?|mrxs|scn|vms|vmu|bif|czi|isyntax|qptiff)(?![A-Z0-9])", re.IGNORECASE)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
DATE = re.compile(r"(?<!\d)(19|20)\d\d([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
SEPARATORS = re.compile(r"[\s_\-,.;()\[\]]+")
PLACE_WORD = (
    r"(?:[xywhrcijlzdn]|row|col|column|level|lvl|lv|idx|index|tile|patch|crop|img|image|im|roi|region|area|size|mag|zoom"
    r"|mpp|class|label|fold|rot|aug|flip|copy|no|nr|pos)"
)
PLACE = re.compile(rf"{PLACE_WORD}?=?\d+(?:x|px|um|mpp|x\d+)?|{PLACE_WORD}=?", re.IGNORECASE)
PLACE_MARK = re.compile(r"[xy]=?\d+", re.IGNORECASE)
NO_SLIDE = re.compile(
    r"(mag|zoom|level|lvl|l|x|scale|res)?[_-]?\d+([.,]\d+)?(x|px|um|mpp)|(mag|zoom|level|lvl|l|x|mpp|scale)[_-]?\d+([.,]\d+)?"
    r"|\d+x\d+|(train|training|test|testing|val|valid|validation|dev|holdout)(ing|set)?|(fold|split|part|batch|chunk)[_-]?\d*"
    r"|(image|img|tile|patch|crop|roi|png|jpg|jpeg|tif|tiff|data|file|picture|slide|wsi|case|patient)s?|low|high|lowres"
    r"|highres",
    re.IGNORECASE,
)
PART_OF_A_SLIDE = re.compile(
    r"(annotation|annot|anno|contour|polygon|roi|region|rgn|rg|area|fragment|frag|field|fov)s?[_-]?\d*"
    r"|top|bottom|left|right|upper|lower|middle",
    re.IGNORECASE,
)
BLOCK_OF_A_CASE = re.compile(r"[A-H]\d{0,2}|(block|blk|section|sec|cut|core|dx|ts|bs|ms)\d*", re.IGNORECASE)
CASE_NUMBER = re.compile(r".*\d{3}.*")
TWO_IN_ONE = re.compile(r"^([A-Z]+\d+)([A-Z]+\d+)$", re.IGNORECASE)  # S1R2
MAGNIFIED = re.compile(r"[_\-\s](\d+x|x\d+|level_?\d+|l\d+|\d+px|mpp_?[\d.]+|[\d.]+mpp)$", re.IGNORECASE)
NEARLY_ALL = 0.9  # of the images: fewer that name a slide are no habit
FEWEST_SURE = 4  # groups: two or three may be anything, two magnifications for instance
FEWEST_OF_A_GROUP = 1.5  # images of a class, on average: what is another nearly each time is no slide
INDEX_AND_PLACE = 3  # numbers in a name that has nothing else: slide, x and y


def by_name(files: Sequence[Path], folder: Path) -> Groups | None:
    """Groups of the image files below ``folder`` by what their names say, None where they say nothing."""
    return by_path([file.relative_to(folder) for file in files])


def by_path(paths: Sequence[Path]) -> Groups | None:
    """As `by_name`, of paths that begin with the class."""
    codes = [match[1].upper() if (match := PATIENT_CODE.search(str(path))) else None for path in paths]
    if found := _groups(codes, paths, "patients, by the names", sure=True, few=True):
        return found
    if found := _groups([slide_file(path) for path in paths], paths, "slides, by the names", few=True):
        return found
    classes = [path.parts[0] for path in paths]
    folders, (marked, names) = (
        slides_in_folders(paths, classes),
        slides_in_names([path.stem for path in paths], classes),
    )
    with_number = sum(any(letter.isdigit() for letter in parts[0]) for parts in folders if parts)
    outermost = [parts[0] if parts else None for parts in folders]
    by_folder = _groups(
        outermost, paths, "slides, by their folders", sure=with_number >= NEARLY_ALL * len(paths), parts=folders
    )
    whole = ["_".join(parts) or None for parts in names]
    by_file = _groups(whole, paths, "slides, by the names", sure=marked, parts=names)
    if by_folder is None or by_file is None:
        return by_folder or by_file
    return _both(by_folder, by_file)


def _groups(
    names: Sequence[str | None],
    paths: Sequence[Path],
    what: str,
    sure: bool = True,
    few: bool = False,
    parts: Sequence[list[str]] = (),
) -> Groups | None:
    """Groups by the names of slides that were read, None where that is implausible; ``few``: a reading that needs
    neither several groups nor several images of each; ``parts``: what the names were made of, the outermost first."""
    told = [name for name in names if name]
    if len(told) < max(1, NEARLY_ALL * len(names)):
        return None
    of = numbered((name or "").casefold() for name in names)
    count = int(of.max()) + 1
    in_classes = len({(path.parts[0], group) for path, group in zip(paths, of.tolist(), strict=True)})
    if not few and (count < 2 or len(names) < FEWEST_OF_A_GROUP * in_classes):
        return None
    example = next(i for i, name in enumerate(names) if name)
    how = f"{what}: '{paths[example].relative_to(paths[example].parts[0])}' is of '{names[example]}'"
    silent = len(names) - len(told)
    if silent:
        how += f", and {silent} images whose names say none are kept together"
    again = comes_again(of, parts)
    if again is not None:
        of, part = again
        if of.max() == 0:
            return None
        how += f", and '{part}' comes again in others: kept together whatever either does"
    return Groups(of, how, known=sure and not silent and again is None and (few or count >= FEWEST_SURE))


def comes_again(of: np.ndarray, parts: Sequence[list[str]]) -> tuple[np.ndarray, str] | None:
    """Where inner names come again in several outer ones, groups (n,) that keep together whatever ``of``, the outer
    names or the inner ones do, and one such inner name; None where no inner name does."""
    for cut in range(1, max(map(len, parts), default=0)):
        outer, inner = (["_".join(names[one]).casefold() for names in parts] for one in (slice(cut), slice(cut, None)))
        pairs = {(end, begin) for begin, end in zip(outer, inner, strict=True) if end}
        found = next((end for end, begins in Counter(end for end, _ in pairs).items() if begins > 1), None)
        if found is not None:
            alone = numbered(end or f"/{i}" for i, end in enumerate(inner))  # without an inner name each is alone
            return joined(joined(of, numbered(outer)), alone), found
    return None


def _both(by_folder: Groups, by_file: Groups) -> Groups:
    """Two readings as one: the coarser where it is made of the other's groups, or else whatever either joins."""
    together = joined(by_folder.of, by_file.of)
    for reading in (by_folder, by_file):
        if together.max() == reading.of.max():
            return reading
    if not by_file.known:
        return by_folder
    return Groups(together, f"{by_folder.how}; {by_file.how}; kept together whatever either does", known=False)


def slide_file(path: Path) -> str | None:
    """``149-B1-HP.ndpi_ROI_3.png`` of class HP → ``149_B1``; None where no slide's file is named."""
    if (match := SLIDE_FILE.search("/".join(path.parts[1:]))) is None:
        return None
    words = [word for word in SEPARATORS.split(match[1]) if word and word.casefold() != path.parts[0].casefold()]
    return "_".join(_of_a_patient(words)) or match[1]


def slides_in_folders(paths: Sequence[Path], classes: Sequence[str]) -> list[list[str]]:
    """For each image the folder that is likely a patient's or a slide's, and those in it that may be; none of a
    patient, whose slides are numbered anew."""
    within = [
        [_patient_of_a_folder(MAGNIFIED.sub("", part)) for part in path.parts[1:-1] if not NO_SLIDE.fullmatch(part)]
        for path in paths
    ]
    found = without_what_classes_say(within, classes)
    return [
        parts[:1]
        if parts and PATIENT_WORD.match(parts[0])
        else parts[:1] + [part for part in parts[1:] if not PART_OF_A_SLIDE.fullmatch(part)]
        for parts in found
    ]


def slides_in_names(stems: Sequence[str], classes: Sequence[str]) -> tuple[bool, list[list[str]]]:
    """For each name the words that it says of the slide, none where nothing; and whether that is sure: a bare number is
    only where x and y are marked as such."""
    whole = [UUID.sub(lambda match: match[0].replace("-", ""), stem) for stem in stems]
    words = in_two([[part for part in SEPARATORS.split(DATE.sub(" ", stem)) if part] for stem in whole])
    words = [parts[::-1] for parts in without_what_classes_say([parts[::-1] for parts in words], classes)]
    heads, places = [], []
    for parts in words:
        end = len(parts)
        while end and (PLACE.fullmatch(parts[end - 1]) or PART_OF_A_SLIDE.fullmatch(parts[end - 1])):
            end -= 1
        start = next((i for i, part in enumerate(parts[:end]) if not part.isdigit()), end)
        heads.append(_of_a_patient(parts[start:end]))
        places.append(parts[end:])
    heads = [_of_a_case(head) for head in without_what_all_say(without_what_classes_say(heads, classes))]
    if any(heads):
        return True, heads
    marked = all(sum(bool(PLACE_MARK.fullmatch(part)) for part in parts) == 2 for parts in places)
    numbers = [[part for part in parts if part.isdigit()] for parts in places]
    numbers = without_what_classes_say(numbers, classes)
    wanted = 1 if marked else INDEX_AND_PLACE
    return marked, [found[:1] if len(found) == wanted else [] for found in numbers]


def in_two(words: Sequence[list[str]]) -> list[list[str]]:
    """``S1R2`` → ``S1``, ``R2``, where nearly every name has such a word: lists of words."""
    having = sum(any(TWO_IN_ONE.fullmatch(word) for word in parts) for parts in words)
    if having < NEARLY_ALL * len(words):
        return list(words)
    return [[piece for word in parts for piece in TWO_IN_ONE.sub(r"\1 \2", word).split()] for parts in words]


def _patient_of_a_folder(name: str) -> str:
    """``patient3-slide2`` → ``patient3``; a name that names no patient as it is."""
    words = SEPARATORS.split(name)
    patient = _of_a_patient(words)
    return name if len(patient) == len(words) else "_".join(patient)


def _of_a_patient(words: list[str]) -> list[str]:
    """The words up to the one that names a patient, all of them where none does."""
    for i, word in enumerate(words):
        if match := PATIENT_WORD.fullmatch(word):
            if match[2]:
                return words[: i + 1]
            if i + 1 < len(words) and any(letter.isdigit() for letter in words[i + 1]):
                return words[: i + 2]
    return words


def _of_a_case(words: list[str]) -> list[str]:
    """Without parts of a slide, where something is left; of a number with blocks (``1234-A1``) the number."""
    words = [word for word in words if not PART_OF_A_SLIDE.fullmatch(word)] or words
    if (
        len(words) > 1
        and CASE_NUMBER.fullmatch(words[0])
        and all(BLOCK_OF_A_CASE.fullmatch(word) for word in words[1:])
    ):
        return words[:1]
    return words


def without_what_all_say(words: Sequence[list[str]]) -> list[list[str]]:
    """Lists of words without those that all of them have; as they are where one would have none left."""
    shared = set.intersection(*map(set, words)) if words else set()
    left = [[word for word in parts if word not in shared] for parts in words]
    return left if all(left) else list(words)


def without_what_classes_say(words: Sequence[list[str]], classes: Sequence[str]) -> list[list[str]]:
    """Lists of words without their first ones, as long as these are the same all over each class."""
    skipped = 0
    while all(len(parts) > skipped for parts in words):
        if len({(klass, parts[skipped]) for klass, parts in zip(classes, words, strict=True)}) > len(set(classes)):
            break
        skipped += 1
    return [parts[skipped:] for parts in words]
