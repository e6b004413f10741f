"""Which images are of one patient or slide, as far as their names say.

There is no one way in which tiles are named, so names are read in several ways, and each way takes the coarsest thing
that it can: groups that are too large cost nothing but choice, groups that are too small put one slide on both sides.

    patients     TCGA's, CPTAC's and GTEx's codes, anywhere in the path
    folders      the outermost one below the class that isn't a magnification, a part (train, test) or a word like
                 ``tiles``, without what the class says again
    file names   what is left of a name without its place: the numbers at its end (places, sizes, levels,
                 magnifications, indices), dates, and words that all names of a class share

Folders and file names that group by each other's parts are taken together. Where they cut across each other, one of
them is wrong: then whatever either joins stays together, and it is a guess.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pretrain.probing.grouping import Groups, joined, numbered

PATIENT_CODE = re.compile(
    r"(?<![A-Z0-9])(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5}|GTEX-[A-Z0-9]{4,5})(?![A-Z0-9])", re.IGNORECASE
)
PATIENT_WORD = re.compile(r"(patient|pat|pt|subject|subj|donor|case)(\d*)", re.IGNORECASE)
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
MAGNIFIED = re.compile(r"[_\-\s](\d+x|x\d+|level_?\d+|l\d+|\d+px|mpp_?[\d.]+|[\d.]+mpp)$", re.IGNORECASE)
NEARLY_ALL = 0.9  # of the images: fewer that name a slide are no habit
FEWEST_SURE = 4  # groups: two or three may be anything, two magnifications for instance
FEWEST_OF_A_GROUP = 1.5  # images of a class, on average: what is another nearly each time is no slide
INDEX_AND_PLACE = 3  # numbers in a name that has nothing else: slide, x and y


def by_name(files: Sequence[Path], folder: Path) -> Groups | None:
    """Groups of the image files below ``folder`` by what their names say, None where they say nothing."""
    paths = [file.relative_to(folder) for file in files]
    codes = [match[1].upper() if (match := PATIENT_CODE.search(str(path))) else None for path in paths]
    if found := _groups(codes, paths, "patients, by the names", sure=True, few=True):
        return found
    classes = [path.parts[0] for path in paths]
    marked, names = slides_in_names([path.stem for path in paths], classes)
    by_folder = _groups(slides_in_folders(paths, classes), paths, "slides, by their folders")
    by_file = _groups(names, paths, "slides, by the names", sure=marked)
    if by_folder is None or by_file is None:
        return by_folder or by_file
    return _both(by_folder, by_file)


def _groups(
    names: Sequence[str | None], paths: Sequence[Path], what: str, sure: bool = True, few: bool = False
) -> Groups | None:
    """Groups by the names of slides that were read, None where that is implausible; ``few``: a reading that needs
    neither several groups nor several images of each."""
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
    return Groups(of, how, known=sure and not silent and (few or count >= FEWEST_SURE))


def _both(by_folder: Groups, by_file: Groups) -> Groups:
    """Two readings as one: the coarser where it is made of the other's groups, or else whatever either joins."""
    together = joined(by_folder.of, by_file.of)
    for reading in (by_folder, by_file):
        if together.max() == reading.of.max():
            return reading
    if not by_file.known:
        return by_folder
    return Groups(together, f"{by_folder.how}; {by_file.how}; kept together whatever either does", known=False)


def slides_in_folders(paths: Sequence[Path], classes: Sequence[str]) -> list[str | None]:
    """For each image the folder that is likely a patient's or a slide's, None where there is none."""
    within = [
        [_patient_of_a_folder(MAGNIFIED.sub("", part)) for part in path.parts[1:-1] if not NO_SLIDE.fullmatch(part)]
        for path in paths
    ]
    return [parts[0] if parts else None for parts in without_what_classes_say(within, classes)]


def slides_in_names(stems: Sequence[str], classes: Sequence[str]) -> tuple[bool, list[str | None]]:
    """For each name what it says of the slide, None where nothing; and whether that is sure: a bare number is only
    where x and y are marked as such."""
    words = [[part for part in SEPARATORS.split(DATE.sub(" ", stem)) if part] for stem in stems]
    words = [parts[::-1] for parts in without_what_classes_say([parts[::-1] for parts in words], classes)]
    heads, places = [], []
    for parts in words:
        end = len(parts)
        while end and PLACE.fullmatch(parts[end - 1]):
            end -= 1
        start = next((i for i, part in enumerate(parts[:end]) if not part.isdigit()), end)
        heads.append(_of_a_patient(parts[start:end]))
        places.append(parts[end:])
    heads = without_what_classes_say(heads, classes)
    if any(heads):
        return True, ["_".join(head) or None for head in heads]
    marked = all(sum(bool(PLACE_MARK.fullmatch(part)) for part in parts) == 2 for parts in places)
    numbers = [[part for part in parts if part.isdigit()] for parts in places]
    numbers = without_what_classes_say(numbers, classes)
    wanted = 1 if marked else INDEX_AND_PLACE
    return marked, [found[0] if len(found) == wanted else None for found in numbers]


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


def without_what_classes_say(words: Sequence[list[str]], classes: Sequence[str]) -> list[list[str]]:
    """Lists of words without their first ones, as long as these are the same all over each class."""
    skipped = 0
    while all(len(parts) > skipped for parts in words):
        if len({(klass, parts[skipped]) for klass, parts in zip(classes, words, strict=True)}) > len(set(classes)):
            break
        skipped += 1
    return [parts[skipped:] for parts in words]
