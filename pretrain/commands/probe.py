"""Score a tile encoder on labelled images: nearest neighbours, a linear classifier, and the rank of its features.

The images lie in class folders, DIR/<class>/*.jpg. Without test=, some of train are held out, and tiles of one slide or
patient stay on one side: as a table says (groups=slides.csv with the columns file and slide, or patient), or the names
(TCGA's, <slide>_<x>_<y>, a folder for each slide), or else their likeness in glass, stains and texture. Three kinds of
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
from data.keyed import rng
from models.allowed import ON_DISK, one_of, within
from pretrain.run.progress import say

if TYPE_CHECKING:
    from pretrain.encoders.probing import Extracted, LabelledImages, Score


SAME_SLIDES, LIKELY, OTHER_SLIDES = "same slides", "likely other slides", "other slides"
"""What a split of the images' own is: tiles of one slide may be on both sides, hardly, or can't."""


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
    from pretrain.encoders import probing
    from pretrain.encoders.loading import load_encoder

    out = Path(config.out) if config.out else None
    if out is not None:
        require_writable(out)
    train = probing.read_class_folders(Path(config.train))
    if config.test is None:
        train, test, split = own_split(train, config)
    else:
        test = probing.read_class_folders(Path(config.test))
        probing.require_same_classes(train, test)
        split = "train and test given"
    encoder = load_encoder(config.checkpoint, config.device or "", config.precision, config.allow_plugins)
    question = question_hash([encoder.hash, str(config.seed)], train, test)
    if out is not None and (earlier := read_scores(out)) is not None and earlier.get("question") == question:
        say(f"{out} holds these scores already, nothing to do")
        print(score_table(earlier))
        return
    random = encoder.random_twin(config.seed)
    extractors: dict[str, probing.Extractor] = {
        "encoder": encoder.embed_each,
        "random weights": random.embed_each,
        "colour histogram": probing.colour_histogram,
    }
    fitted = probing.extract(train, extractors, config.batch, config.threads, "train")
    tested = probing.extract(test, extractors, config.batch, config.threads, "test")
    within = None if config.test is not None else histogram_within(train, fitted, tested, config)
    scores = {
        name: probing.score(
            fitted.features[name], fitted.labels, tested.features[name], tested.labels, len(train.classes)
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
        **({"histogram_same_slides": within} if within is not None else {}),
        "chance": float(np.bincount(tested.labels).max() / len(tested.labels)),
        "method": {
            "knn": f"{min(probing.KNN_NEIGHBOURS, len(fitted.labels))} nearest by cosine, votes weighted exp(cosine / {probing.TEMPERATURE})",
            "linear": f"logistic regression on standardised features, L2, C = {probing.INVERSE_REGULARISATION:g}, up to 1000 iterations",
            "rankme": "of the test features, not centred (Garrido 2023)",
            "standard_error": "binomial over test images; of a gain, paired over test images",
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
            for name, got in scores.items()
        },
        "gains": {
            baseline: gains(scores["encoder"], scores[baseline]) for baseline in ("random weights", "colour histogram")
        },
    }
    if out is not None:
        write_scores(out, result)
    print(score_table(result))
    if out is not None:
        say(f"written to {out}")


def own_split(images: "LabelledImages", config: Config) -> "tuple[LabelledImages, LabelledImages, str]":
    """Train and test images of one folder, tiles of one patient or slide kept together where that can be, and how in
    words."""
    from data.ahead import map_ahead
    from pretrain.encoders import probing
    from pretrain.encoders.slide_groups import groups_of

    pixels = map_ahead(probing.image_or_fault, images.files, config.threads, ahead=2 * config.batch)
    groups = groups_of(images.files, images.folder, Path(config.groups) if config.groups else None, pixels)
    found = probing.grouped_split(images, groups.of, config.test_fraction, config.seed)
    if found is None:
        train, test = map(images.subset, probing.stratified_split(images, config.test_fraction, config.seed))
        said = f"{SAME_SLIDES}: {config.test_fraction:g} of every class held out, seed {config.seed}; by {groups.how} no class is on both sides"
        return train, test, said
    train, test = (images.subset(part) for part in found)
    kind = OTHER_SLIDES if groups.known else LIKELY
    return (
        train,
        test,
        f"{kind}: {len(test.files) / len(images.files):.2g} held out by {groups.how}, seed {config.seed}",
    )


def histogram_within(train: "LabelledImages", fitted: "Extracted", tested: "Extracted", config: Config) -> float:
    """k-NN accuracy of the colour histogram where tiles of one slide are on both sides, on as many test images."""
    from pretrain.encoders import probing

    features = np.concatenate([part.features["colour histogram"] for part in (fitted, tested)])
    labels = np.concatenate([fitted.labels, tested.labels])
    order = rng(config.seed, "same slides").permutation(len(labels))
    asked, bank = order[: len(tested.labels)], order[len(tested.labels) :]
    predicted = probing.knn_predict(features[bank], labels[bank], features[asked], len(train.classes))
    return float((predicted == labels[asked]).mean())


def gains(ours: "Score", baseline: "Score") -> dict[str, dict[str, float]]:
    """How much more accurate than a baseline, with each classifier."""
    from pretrain.encoders.probing import gain

    pairs = {
        "knn": (ours.knn_correct, baseline.knn_correct),
        "linear": (ours.linear_correct, baseline.linear_correct),
    }
    return {kind: dict(zip(("gain", "se"), gain(*pair), strict=True)) for kind, pair in pairs.items()}


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


def read_scores(path: Path) -> dict[str, Any] | None:
    """The scores that an earlier run wrote, None where there are none. Raises `Fault` for a file that is something
    else."""
    if not path.exists():
        return None
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise Fault(f"{path} exists and isn't JSON: choose another out=, or remove it") from error
    if not isinstance(earlier, dict) or "question" not in earlier:
        raise Fault(f"{path} exists and holds no scores of 'pretrain probe': choose another out=, or remove it")
    return earlier


def write_scores(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    write_whole(path, json.dumps(result, indent=2) + "\n")


def score_table(result: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    train, test = result["train"], result["test"]
    lines = [
        f"{result['encoder']['name']}: {train['images']} training and {test['images']} test images "
        f"in {len(result['classes'])} classes ({result['split']})",
        f"input: {result['encoder']['input']}",
        "",
        f"{'features':<18}{'width':>7}{'k-NN':>16}{'linear':>16}{'RankMe':>9}",
    ]
    for name, got in result["scores"].items():
        linear = accuracy(got["linear"], got["linear_se"]) + (" " if got["linear_converged"] else "*")
        lines.append(
            f"{name:<18}{got['width']:>7}{accuracy(got['knn'], got['knn_se']):>16}{linear:>17}{got['rankme']:>8.1f}"
        )
    lines.append(f"{'largest class':<18}{'':>7}{result['chance']:>8.3f}        {result['chance']:>8.3f}")
    lines.append("")
    for baseline, kinds in result["gains"].items():
        k, linear = kinds["knn"], kinds["linear"]
        lines.append(
            f"gain over {baseline:<18}{k['gain']:>+8.3f} ± {k['se']:.3f}{linear['gain']:>+8.3f} ± {linear['se']:.3f}"
        )
    lines += ["", f"k-NN: {result['method']['knn']}", f"linear: {result['method']['linear']}"]
    lines.append(f"±: one standard error ({result['method']['standard_error']})")
    if result["split"].startswith(SAME_SLIDES):
        lines.append(
            "same slides: tiles of one patient may be on both sides, which flatters every row; give test=, or groups= with their slides"
        )
    if result["split"].startswith(LIKELY):
        lines.append("likely other slides: a guess; give test=, or groups= with their slides, to be sure")
    within, across = result.get("histogram_same_slides"), result["scores"]["colour histogram"]
    if (
        within is not None
        and not result["split"].startswith(SAME_SLIDES)
        and within - across["knn"] > max(0.1, 3 * across["knn_se"])
    ):
        lines.append(
            f"beware: with tiles of the same slides on both sides the colour histogram reaches {within:.3f}, on others {across['knn']:.3f}: a random split of "
            "these images measures how well slides are recognised"
        )
    if not all(got["linear_converged"] for got in result["scores"].values()):
        lines.append("*: the linear fit stopped at 1000 iterations before it converged")
    unreadable = len(train["unreadable"]) + len(test["unreadable"])
    if unreadable:
        lines.append(f"{unreadable} images could not be read and were left out; the JSON names them")
    return "\n".join(lines)


def accuracy(value: float, error: float) -> str:
    """``0.613 ± 0.022``."""
    return f"{value:.3f} ± {error:.3f}"
