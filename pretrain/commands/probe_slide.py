"""Is a slide encoder of use? Its vectors against labels of slides, beside rows that need no slide encoder.

The rows: the mean of a slide's tiles; with their standard deviation; with that of spatially smoothed tiles too, which
tells how tiles are arranged and has learned nothing; the slide encoder's vectors, by pooling; the same network with
random weights; and attention trained on the labels. Whoever isn't above the first and the third has learned nothing of
use for these labels.

labels= is a CSV, TSV or Parquet with the columns slide and label (classes, or a number; label=NAME takes another
column), or slide, time and event. Optional: patient, whose slides are judged together; fold, split or fold_0, fold_1 …,
who is judged when. Columns as Patho-Bench, eva and CLAM call them are known.

Folds keep patients together (by the column, or TCGA's names) and classes in proportion. Intervals are of a bootstrap over
patients, and so are those of the difference to the mean of the tiles; they tell who was judged, not what was fitted, and
are too narrow for it. It prints a table, and writes JSON to out=, with every prediction, and a page beside it.

Examples:

    pretrain probe slide store=embeddings labels=labels.csv checkpoint=runs/slide out=probe.json
    pretrain probe slide store=embeddings labels=labels.csv            # no slide encoder: is there anything to gain?
    pretrain probe slide store=embeddings labels=k=all.tsv label=BRAF checkpoint=slide_encoder.pth
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import require_writable, write_whole
from models.allowed import ON_DISK, one_of, within
from pretrain.run.progress import say


@dataclass
class Config:
    store: Annotated[str, ON_DISK]
    labels: Annotated[str, ON_DISK]
    label: str | None
    checkpoint: Annotated[str | None, ON_DISK]
    out: Annotated[str | None, ON_DISK]
    folds: Annotated[int, within(least=2)]
    repeats: Annotated[int, within(least=1)]
    attention: bool
    seed: Annotated[int, within(least=0)]
    tokens: Annotated[int, within(least=1)]
    device: str | None
    precision: Annotated[str, one_of("float32", "bfloat16")]
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Probe, print the table, and write JSON and page."""
    from pretrain.encoders.frozen import device_of
    from pretrain.encoders.slide_encoders import load_slide_encoder
    from pretrain.slide_probing.answer import answers, as_json
    from pretrain.slide_probing.folds import rounds_of
    from pretrain.slide_probing.judge import Judge
    from pretrain.slide_probing.labels import read_labels
    from pretrain.slide_probing.page import slide_probe_page
    from pretrain.slide_probing.table import slide_table

    out = None if config.out is None else Path(config.out)
    if out is not None:
        if out.suffix != ".json":
            raise Fault(f"out={out} must end with .json: the page is written beside it, with .html.")
        require_writable(out)
        require_writable(out.with_suffix(".html"))
    store = EmbeddingStore.open(Path(config.store))
    labelled = read_labels(Path(config.labels), config.label, {slide: store.rows(slide) for slide in store.slides})
    for sentence in labelled.said:
        say(sentence)
    rounds = rounds_of(labelled, config.folds, config.repeats, config.seed)
    encoder = (
        load_slide_encoder(config.checkpoint, config.device or "", config.allow_plugins) if config.checkpoint else None
    )
    if encoder is not None:
        encoder.require_fits(store)
    found = answers(
        store,
        labelled,
        Judge(labelled, rounds, config.seed),
        encoder,
        seed=config.seed,
        tokens=config.tokens,
        precision=config.precision,
        attention=config.attention,
        device=device_of(config.device or ""),
    )
    who = "as the table says" if labelled.rounds is not None else f"{config.folds} folds, {config.repeats} times"
    how = [
        f"{len(rounds)} rounds ({who}); a figure is of all that is judged once, averaged over repetitions",
        "in brackets: 95 of 100 draws of a bootstrap over those judged; what was fitted isn't drawn anew, so the truth"
        " lies outside more often: of labels that tell nothing, in 13 to 15 of 100 tables with 60 cases",
        "linear models on standardised vectors: logistic regression (C = 1), ridge, or proportional hazards",
        "clusters of tiles are found without labels, on all of these slides",
    ]
    result = as_json(found, store, encoder, how)
    if out is not None:
        write_whole(out, json.dumps(result, allow_nan=False) + "\n")
        write_whole(out.with_suffix(".html"), slide_probe_page(result, found))
        say(f"written to {out} and {out.with_suffix('.html')}")
    print(slide_table(result))
