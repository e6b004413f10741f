"""Score a tile encoder on labelled images: nearest neighbours, a linear classifier, and the rank of its features.

The images lie in class folders, DIR/<class>/*.jpg. Without test=, some of train are held out, and tiles of one slide or
patient stay on one side: as a table says (groups=slides.csv with the columns file and slide, or patient), or the names
(TCGA's, <slide>_<x>_<y>, a folder for each slide; it says how it read them), or else their likeness in glass, stains
and texture. Standard errors are over slides where these are told, since tiles of one slide err together. Three kinds of
features answer the same question: the encoder's, a 96-bin colour histogram's, and those of the encoder's own
architecture with random weights. What counts is the gain over the last two: on many tile sets colour alone goes far.

It prints a table, and writes it as JSON to out=. Run again with the same inputs, it shows what it found.

Examples:

    pretrain probe checkpoint=runs/tile train=crc/train test=crc/test out=runs/tile/probe.json
    pretrain probe checkpoint=encoder train=crc out=probe.json
    pretrain probe checkpoint=vit_small_patch14_dinov2 train=crc groups=slides.csv
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.fault import Fault
from data.files import require_writable, write_whole
from models.allowed import ON_DISK, one_of, within
from pretrain.probing.score_file import OF_TILES, read_scores
from pretrain.probing.table import score_table
from pretrain.run.progress import say
from pretrain.settings.composition import of_the_command_line


@dataclass
class Config:
    checkpoint: Annotated[str, ON_DISK]
    train: Annotated[str, ON_DISK]
    test: Annotated[str | None, ON_DISK]
    out: Annotated[str | None, ON_DISK]
    groups: Annotated[str | None, ON_DISK]
    test_fraction: Annotated[float, within(above=0, below=1)]
    seed: Annotated[int, within(least=0)]
    batch: Annotated[int, within(least=1)]
    threads: Annotated[int, within(least=1)]
    device: str | None
    precision: Annotated[str, one_of("float32", "bfloat16")]
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Probe, print the table and write the JSON."""
    from pretrain.encoders.loading import load_encoder, require_no_slide_run
    from pretrain.probing.answer import answered
    from pretrain.probing.question import asked_of

    if config.test and config.groups:
        with of_the_command_line():
            raise Fault("groups= says how train= is split, and test= is given: leave one of them out.")
    test, groups, out = (None if path is None else Path(path) for path in (config.test, config.groups, config.out))
    if out is not None:
        require_writable(out)
    require_no_slide_run(config.checkpoint, config.allow_plugins)
    question = asked_of(
        Path(config.train), test, groups, config.test_fraction, config.seed, config.threads, ahead=2 * config.batch
    )
    encoder = load_encoder(config.checkpoint, config.device or "", config.precision, config.allow_plugins)
    asked = question.hash(encoder.hash, config.seed)
    earlier = (
        read_scores(out, "choose another out=, or remove it", OF_TILES) if out is not None and out.exists() else {}
    )
    if out is not None and earlier.get("question") == asked:
        say(f"{out} holds these scores already, nothing to do")
        print(score_table(earlier))
        return
    result = {"question": asked} | answered(question, encoder, config.seed, config.batch, config.threads)
    if out is not None:
        write_whole(out, json.dumps(result, indent=2) + "\n")
    print(score_table(result))
    if out is not None:
        say(f"written to {out}")
