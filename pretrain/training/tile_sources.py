"""Sources of tiles as settings name them: slides read online, Parquet files, weighted mixtures, and of any of them what a
table chooses. Shards need nothing more: `data.tiles.of_shards`."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.fault import Fault
from data.files import Refused, require_writable
from data.lease import once
from data.parquet.files import list_parquet
from data.parquet.index import ParquetIndex, ParquetQuestion, scan_parquet
from data.remote import is_remote
from data.slides.lists import list_slides
from data.slides.mpp import SlidesMpp
from data.slides.survey import known_survey, survey_slides
from data.slides.tiling import TilingSettings
from data.tiles.chosen import Chosen, ChosenTiles, chosen_path, find_chosen, read_chosen
from data.tiles.mixture import Mixture
from data.tiles.of_parquet import ParquetTiles
from data.tiles.of_slides import SlideTiles
from data.tiles.places import TilePlaces
from data.tiles.sample_table import SampleTable
from data.tiles.scales import LAWS, Scales
from data.tiles.source import TileSource
from models.allowed import ON_DISK, PATTERN, SHARE, SOME, TILE, Agreements, one_of, within
from pretrain.run.launched import rank
from pretrain.run.progress import Progress, say, track
from pretrain.run.signals import heed, heeding
from pretrain.settings import plugins, ranges
from pretrain.settings.config_files import CONFIGS
from pretrain.settings.refusals import nearest
from pretrain.settings.tissue_rules import RULES, chosen_rules

DATA_CONFIGS = {
    "shards": "tiles",
    "slides": "online",
    "files": "parquet",
}  # the setting that only one kind of member has → its file in configs/data
NAMED = 10  # slides left out that are said one by one
MEMBER_KINDS = {"weight": Annotated[float, within(above=0)], "sample": Annotated[str | None, ON_DISK]}
"""What every member of a mixture has beside the settings of its kind."""


_VALUES = "values"


def check_scales(mpp: list[float], mpp_law: str, mpp_shares: list[float]) -> None:
    """Raise ValueError for a value that comes twice, for shares of no values, and for a law without two ends."""
    if len({f"{value:g}" for value in mpp}) < len(mpp):
        raise ValueError("each value of mpp comes once, and mpp_shares says how often it is read")
    if mpp_law != _VALUES and (len(mpp) != 2 or mpp[0] >= mpp[1]):
        raise ValueError(f"between two values µm/px are drawn, the finer first, as mpp=[0.25,2.0] mpp_law={mpp_law}")
    if mpp_shares and (mpp_law != _VALUES or len(mpp_shares) != len(mpp)):
        raise ValueError("each value of mpp has one share, and only values have")


class OnlineSlides(Mixture):
    """Tiles at random places in the tissue of slides, at one or several ``mpp`` in equal shares (kaiko) or in
    ``mpp_shares``, or at one that is drawn for each tile between two; see `SlideTiles`.

    Where the tissue is is looked up once, in parallel processes, and kept in ``grids``. Slides that can't be used are
    named and left out; raises Fault where none is left at some resolution.
    """

    reads_slides = True
    agreements: ClassVar[Agreements] = {("mpp", "mpp_law", "mpp_shares"): check_scales}

    def __init__(
        self,
        group: int = 1,
        *,
        slides: Annotated[list[str], SOME, ON_DISK],
        grids: Annotated[str, ON_DISK],
        mpp: Annotated[list[float], SOME, within(above=0)],
        mpp_law: Annotated[str, one_of(_VALUES, *LAWS)],
        mpp_shares: Annotated[list[float], within(above=0)],
        tiles_per_slide: Annotated[int | None, within(least=1)],
        tile_size: Annotated[int, TILE],
        tissue: Annotated[list[Any], SOME, RULES],
        min_tissue: Annotated[list[float] | None, SHARE],
        slides_mpp: str | None,
        workers: Annotated[int | None, within(least=1)],
    ) -> None:
        paths, said_mpp = list_slides(slides), SlidesMpp.parse(slides_mpp)
        said_mpp.tells_of(paths)
        rules = chosen_rules(tissue, min_tissue)
        members: dict[str, tuple[TileSource, float]] = {}
        scales = None if mpp_law == _VALUES else Scales(mpp[0], mpp[1], mpp_law)
        shares = mpp_shares or [1.0] * len(mpp)
        for scale, share in zip(mpp, shares, strict=True) if scales is None else [(scales.finest, 1.0)]:
            settings = TilingSettings(scale, tile_size, rules)
            folder = Path(grids) / f"{scale:g}um-{tile_size}px"
            look = partial(_survey, folder, paths, settings, said_mpp, workers)
            once(folder / "survey.json", look, partial(heed, kept=True))
            surveyed = known_survey(folder, paths, settings, said_mpp)
            assert surveyed is not None
            if not surveyed.slides:
                raise Fault(
                    f"none of the {len(paths)} slides gives a tile at {scale:g} µm/px; {folder}/survey.json says why."
                )
            members[f"{scale:g} µm/px"] = SlideTiles(surveyed, group, scales=scales, most=tiles_per_slide), share
        super().__init__(members)


class ParquetFiles(ParquetTiles):
    """Tiles of Parquet files, the hub's data sets among them; see `ParquetTiles`.

    Footers and names of slides are looked through once, and kept in ``index``, or beside the files. Files that can't be
    used are named and left out; raises Fault where none is left.
    """

    def __init__(
        self,
        group: int = 1,
        *,
        files: Annotated[list[str], SOME],
        index: Annotated[str | None, ON_DISK],
        image: str | None,
        slide: str | None,
        patient: str | None,
        slide_pattern: Annotated[str | None, PATTERN],
        hold_out: Annotated[float, within(least=0, below=1)],
    ) -> None:
        listed = list_parquet(files)
        question = ParquetQuestion.of(listed, image, slide, patient, slide_pattern)
        folder = Path(index) if index else _beside(listed)
        once(question.path(folder), partial(scan_parquet, folder, question, _passed_on), partial(heed, kept=True))
        found = ParquetIndex.open(folder, question)
        for why in found.left_out[:NAMED]:
            say(f"left out: {why}")
        if len(found.left_out) > NAMED:
            say(f"… and {len(found.left_out) - NAMED} more Parquet files are left out")
        for why in () if rank() else found.unnamed:
            say(why)
        super().__init__(found, group, hold_out)


def _passed_on(files: Iterable[Any], count: int) -> Iterable[Any]:
    return track(heeding(files, kept=True), count, "looking through Parquet files", "files")


def _beside(files: list[str]) -> Path:
    """The folder of the files on a disk. Raises Fault where there is none, or none of the user's."""
    way_out = "say where their index goes, by data.index=FOLDER"
    if any(map(is_remote, files)):
        raise Fault(f"{files[0]} is remote: {way_out}.")
    folder = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    try:
        require_writable(folder / "index")
    except Refused as refusal:
        raise Fault(f"{refusal} Or {way_out}.") from refusal
    return folder


def build_source(data: Mapping[str, Any], group: int = 1) -> TileSource:
    """The source that the settings ``data`` name, among others. Raises Fault where it can't be opened."""
    target = data["_target_"]
    own = {name: data[name] for name in plugins.settings_of(target, TileSource)}
    return chosen_by(plugins.build({"_target_": target, **own}, group, base=TileSource), data["sample"], group)


def chosen_by(source: TileSource, table: str | None, group: int) -> TileSource:
    """The tiles of a source that a table chooses, as often as it says (`data.tiles.sample_table`); None: the source.

    They are looked up once, and kept beside the table. Raises Fault for a table that can't be used, and for a source
    that has none of its tiles.
    """
    if table is None:
        return source
    path = chosen_path(Path(table), source)
    if not path.exists():
        try:
            require_writable(path)
        except Refused as refusal:
            raise Fault(f"{refusal} Or copy the table to a folder of yours, and give that.") from refusal

    def look() -> None:
        find_chosen(path, SampleTable(Path(table)), source, partial(_looked_up, len(source)))

    once(path, look, partial(heed, kept=True))
    found = read_chosen(path)
    made = ChosenTiles(source, found, group)
    if not rank():
        for sentence in _says_chosen(table, source, made, found):
            say(sentence)
    return made


def _looked_up(tiles: int, places: Iterable[TilePlaces]) -> Iterator[TilePlaces]:
    progress = Progress(tiles, "looking up tiles in data.sample", "tiles")
    try:
        for some in heeding(places):
            yield some
            progress.advance(len(some.x))
    finally:
        progress.close()


def _says_chosen(table: str, source: TileSource, made: ChosenTiles, found: Chosen) -> Iterator[str]:
    often = "" if len(made) == found.tiles else f", {len(made):,} a pass, by their weights"
    away = "are held out or aren't" if found.lost and source.held_out() else "aren't"
    yield (
        f"{table}: trains on {found.tiles:,} of {len(source):,} tiles{often}; leaves out {found.left:,}, and {found.unknown:,}"
        f" that it hasn't got; of its own, {found.lost:,} {away} in this source"
    )
    before, after = (len(one) / sum(len(part.block_sizes) for part in one.parts) for one in (source, made))
    if after < before / 2:
        yield (
            f"blocks hold {after:.3g} tiles, of {before:.3g}: a data.window {before / after:.0f} times as large mixes as"
            " many as without data.sample"
        )


def check_members(members: Mapping[str, Any] | None) -> None:
    """Raise Fault for members of a mixture that name no source, or have settings that it hasn't; None: the doctor looks
    at none."""
    if members is None:
        return
    if not members:
        raise Fault("data.members is empty: name the sources to mix, as data.members={a:{shards:…,weight:1},b:{…}}.")
    for name, member in members.items():
        _member(name, member)


class WeightedMixture(Mixture):
    """Several sources with a weight each, exact in the long run. A member is ``{weight: …}`` and the settings of its
    kind: ``shards`` as in ``data=tiles``, ``slides`` and the like as in ``data=online``, or any class that its
    ``_target_`` names."""

    agreements: ClassVar[Agreements] = {("members",): check_members}

    def __init__(self, group: int = 1, *, members: dict[str, Any]) -> None:
        check_members(members)
        typed = {name: _member(name, member) for name, member in members.items()}
        super().__init__(
            {
                name: (chosen_by(plugins.build(settings, group, base=TileSource), table, group), weight)
                for name, (settings, weight, table) in typed.items()
            }
        )


def _member(name: str, given: Any) -> tuple[dict[str, Any], float, str | None]:
    """A member's settings, with the class that they are of, its weight, and the table that its tiles are chosen by.
    Raises Fault for what it lacks, for settings that its kind doesn't have, and for values of another type or out of
    their range."""
    prefix = f"data.members.{name}."
    if not isinstance(given, Mapping):
        raise Fault(f"data.members.{name}={given} is no source: give its settings, {{shards:…,weight:1}}.")
    if given.get("weight") is None:
        raise Fault(f"{prefix}weight is missing: it is the member's share, in any scale.")
    defaults = _defaults(name, given)
    wanted: dict[str, Any] = {key: get_args(kind)[0] for key, kind in MEMBER_KINDS.items()} | plugins.settings_of(
        defaults["_target_"], TileSource
    )
    settings = {"sample": None} | {key: value for key, value in defaults.items() if key in wanted} | dict(given)
    for key in settings.keys() - wanted.keys() - {"_target_"}:
        if "_target_" in given and (why := plugins.why_unknown(given["_target_"], key)):
            raise Fault(f"there is no setting '{prefix}{key}': {why}")
        raise Fault(f"there is no setting '{prefix}{key}'{nearest(key, set(wanted))}")
    for key, kind in wanted.items():
        if settings.get(key, ranges.MISSING) == ranges.MISSING:
            raise Fault(f"{prefix}{key} must be given.")
        if plugins.takes_list(kind) and settings[key] is not None and not isinstance(settings[key], list):
            settings[key] = [settings[key]]
        if settings[key] == [] and defaults.get(key) != []:
            raise Fault(f"{prefix}{key} is empty: give a value, or leave the member out.")
        settings[key] = _typed(f"{prefix}{key}", kind, settings[key])
    settings["_target_"] = defaults["_target_"]
    common = {key: settings.pop(key) for key in MEMBER_KINDS}
    ranges.require_allowed(common, MEMBER_KINDS, prefix)
    ranges.require_allowed({name: settings}, {name: plugins.Plugin}, "data.members.")
    return settings, common["weight"], common["sample"]


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A value as one of its type. Raises Fault where it can't be."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(make_dataclass("Setting", [("value", kind)])), {"value": value})
        return OmegaConf.to_container(tree)["value"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        raise Fault(f"{name}: {str(error).splitlines()[0]}") from error


def _defaults(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if "_target_" in given:
        return {"_target_": given["_target_"]}
    kinds = [key for key in DATA_CONFIGS if key in given]
    if len(kinds) > 1:
        raise Fault(
            f"data.members.{name} has {' and '.join(f'{key}=…' for key in kinds)}: a member is one source; make it two."
        )
    for key, file in DATA_CONFIGS.items():
        if key in given:
            return yaml.safe_load((CONFIGS / "data" / f"{file}.yaml").read_text())
    raise Fault(f"data.members.{name} says no source: give it shards=…, slides=… or files=….")


def _survey(
    folder: Path, paths: list[Path], settings: TilingSettings, slides_mpp: SlidesMpp, workers: int | None
) -> None:
    looked_at = survey_slides(folder, paths, settings, slides_mpp, workers or len(os.sched_getaffinity(0)))
    left_out = overruled = 0
    for _, result in track(
        heeding(looked_at, kept=True), len(paths), f"finding tissue at {settings.mpp:g} µm/px", "slides"
    ):
        if isinstance(result, Fault):
            left_out += 1
            if left_out <= NAMED:
                say(f"left out: {result}")
        elif result.overruled:
            overruled += 1
            if overruled <= NAMED:
                say(result.overruled)
    if left_out > NAMED:
        say(f"… and {left_out - NAMED} more slides are left out; {folder}/survey.json names them all")
    if overruled > NAMED:
        say(f"… and what {overruled - NAMED} more slides say is overruled")
