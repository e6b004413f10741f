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

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from data.fault import Fault
from data.files import require_writable, write_whole
from models.allowed import ON_DISK, one_of, within
from pretrain.probing.score_file import read_scores
from pretrain.probing.table import score_table
from pretrain.run.progress import say
from pretrain.settings.composition import of_the_command_line

if TYPE_CHECKING:
    from pretrain.probing.features import Extracted
    from pretrain.probing.images import LabelledImages


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
    from pretrain.encoders.loading import load_encoder
    from pretrain.probing import features, images, scores, splits
    from pretrain.probing.slide_names import by_name

    if config.test and config.groups:
        with of_the_command_line():
            raise Fault("groups= says how train= is split, and test= is given: leave one of them out.")
    out = Path(config.out) if config.out else None
    if out is not None:
        require_writable(out)
    train = images.read_class_folders(Path(config.train))
    if config.test is None:
        own = splits.own_split(
            train,
            Path(config.groups) if config.groups else None,
            config.test_fraction,
            config.seed,
            config.threads,
            ahead=2 * config.batch,
        )
        train, test, split, groups = own.train, own.test, own.words, own.test_groups
    else:
        test = images.read_class_folders(Path(config.test))
        images.require_same_classes(train, test)
        split, groups = "train and test given", by_name(test.files, test.folder)
    encoder = load_encoder(config.checkpoint, config.device or "", config.precision, config.allow_plugins)
    told_apart = [] if groups is None else [groups.how, str(groups.of.tolist())]
    question = question_hash([encoder.hash, str(config.seed), *told_apart], train, test)
    earlier = read_scores(out, "choose another out=, or remove it") if out is not None and out.exists() else {}
    if out is not None and earlier.get("question") == question:
        say(f"{out} holds these scores already, nothing to do")
        print(score_table(earlier))
        return
    random = encoder.random_twin(config.seed)
    extractors: dict[str, features.Extractor] = {
        "encoder": encoder.embed_each,
        "random weights": random.embed_each,
        "colour histogram": features.colour_histogram,
    }
    fitted = features.extract(train, extractors, config.batch, config.threads, "train")
    tested = features.extract(test, extractors, config.batch, config.threads, "test")
    of = None if groups is None else groups.of[tested.positions]
    colours = [part.features["colour histogram"] for part in (fitted, tested)]
    found = {
        name: scores.score(
            fitted.features[name], fitted.labels, tested.features[name], tested.labels, len(train.classes), of
        )
        for name in extractors
    }
    result: dict[str, Any] = {
        "question": question,
        "encoder": {
            "name": encoder.name,
            "source": encoder.source,
            "hash": encoder.hash,
            "width": encoder.width,
            "input": str(encoder.preprocessing),
            "precision": encoder.precision,
        },
        "train": describe_images(train, fitted),
        "test": describe_images(test, tested),
        "classes": train.classes,
        "split": split,
        **(
            {}
            if config.test
            else {
                "histogram_same_slides": scores.knn_within(
                    colours[0], fitted.labels, colours[1], tested.labels, len(train.classes), config.seed
                )
            }
        ),
        "chance": float(np.bincount(tested.labels).max() / len(tested.labels)),
        "method": {
            "knn": (
                f"{min(scores.KNN_NEIGHBOURS, len(fitted.labels))} nearest by cosine, votes weighted exp(cosine /"
                f" {scores.TEMPERATURE})"
            ),
            "linear": (
                f"logistic regression on standardised features, L2, C = {scores.INVERSE_REGULARISATION:g}, up to 1000"
                " iterations"
            ),
            "rankme": "of the test features, not centred (Garrido 2023)",
            "standard_error": scores.words_of_error(of, "" if groups is None else groups.how),
        },
        "scores": {
            name: {
                "knn": got.knn,
                "knn_se": got.knn_se,
                "linear": got.linear,
                "linear_se": got.linear_se,
                "linear_converged": got.linear_converged,
                "rankme": got.rankme,
                "width": fitted.features[name].shape[1],
            }
            for name, got in found.items()
        },
        "gains": {
            baseline: scores.gains(found["encoder"], found[baseline], of)
            for baseline in ("random weights", "colour histogram")
        },
    }
    if out is not None:
        write_scores(out, result)
    print(score_table(result))
    if out is not None:
        say(f"written to {out}")


def question_hash(parts: list[str], *folders: "LabelledImages") -> str:
    """A hash of what was asked: the given parts, and every image's class, name and size in bytes."""
    digest = hashlib.sha256("\n".join(parts).encode())
    for images in folders:
        for path, label in zip(images.files, images.labels, strict=True):
            digest.update(f"{images.classes[label]} {path.name} {path.stat().st_size}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()[:16]


def describe_images(images: "LabelledImages", extracted: "Extracted") -> dict[str, Any]:
    """How many images of a folder were used, and which were not."""
    return {"folder": str(images.folder), "images": len(extracted.labels), "unreadable": extracted.unreadable}


def write_scores(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    write_whole(path, json.dumps(result, indent=2) + "\n")
