"""Is a slide encoder of use? Its vectors against labels of slides, beside rows that need no slide encoder.

The rows: the mean of a slide's tiles; with their standard deviation; with that of spatially smoothed tiles too, which
tells how tiles are arranged and has learned nothing; the slide encoder's vectors, by pooling; the same network with
random weights; and attention trained on the labels. Whoever isn't above the first and the third has learned nothing of
use for these labels. fine_tune=STEPS adds the slide encoder, and those random weights, trained on the labels from end to
end. Where a patient has several slides, a row takes the mean of their vectors, and further rows attend over them.

labels= is a CSV, TSV or Parquet with the columns slide and label (classes, or a number; label=NAME takes another
column), or slide, time and event. Optional: patient, whose slides are judged together; fold, split or fold_0, fold_1 …,
who is judged when. Columns as Patho-Bench, eva and CLAM call them are known, and so is what Patho-Bench's config.yaml
says beside a table; label=OS reads OS_days and OS_event.

An empty cell is no label; NA, N/A, none and null are none beside numbers, and a class beside words, which it says.

Folds keep patients together (by the column, or TCGA's names where it is empty) and classes in proportion. Intervals are
of a bootstrap over patients, and so are those of the difference to the mean of the tiles; they tell who was judged, not
what was fitted, and are too narrow for it. It prints a table, and writes JSON to out=, with every prediction, and a page
beside it. Run again with the same inputs, it shows what it found. direction=FOLDER keeps the weights of a linear model
on the slide encoder's vector, for maps of what its answer depends on.

Examples:

    pretrain probe slide store=embeddings labels=labels.csv checkpoint=runs/slide out=probe.json
    pretrain probe slide store=embeddings labels=labels.csv            # no slide encoder: is there anything to gain?
    pretrain probe slide store=[embeddings,more] labels=labels.csv checkpoint=runs/slide fine_tune=200
    pretrain probe slide store=embeddings labels=labels.csv checkpoint=runs/slide direction=direction
    pretrain embed stage=slide checkpoint=runs/slide embeddings=embeddings out=maps maps=sensitivity direction=direction/weights.npy
    pretrain probe slide store=embeddings labels=k=all.tsv label=BRAF checkpoint=slide_encoder.pth
"""

import json
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import require_writable, write_whole
from models.allowed import ON_DISK, SOME, one_of, within
from pretrain.probing.score_file import OF_SLIDES, read_scores
from pretrain.run.progress import say
from pretrain.settings.composition import of_the_command_line
from pretrain.slide_probing.labels import LabelledSlides, read_labels


@dataclass
class Config:
    store: Annotated[list[str], SOME, ON_DISK]
    labels: Annotated[str, ON_DISK]
    label: str | None
    cases: Annotated[str | None, one_of("patient", "slide")]
    checkpoint: Annotated[str | None, ON_DISK]
    out: Annotated[str | None, ON_DISK]
    direction: Annotated[str | None, ON_DISK]
    folds: Annotated[int, within(least=2)]
    repeats: Annotated[int, within(least=1)]
    attention: bool
    fine_tune: Annotated[int, within(least=0)]
    seed: Annotated[int, within(least=0)]
    tokens: Annotated[int, within(least=1)]
    device: str | None
    precision: Annotated[str, one_of("float32", "bfloat16")]
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Probe, print the table, and write JSON and page."""
    from pretrain.encoders.frozen import device_of
    from pretrain.encoders.slide_encoders import load_slide_encoder
    from pretrain.slide_probing.answer import SlideQuestion, answers, as_json
    from pretrain.slide_probing.direction import WEIGHTS_FILE, require_one_output, write_direction
    from pretrain.slide_probing.folds import rounds_of
    from pretrain.slide_probing.judge import Judge
    from pretrain.slide_probing.page import slide_probe_page
    from pretrain.slide_probing.table import slide_table

    out = None if config.out is None else Path(config.out)
    with of_the_command_line():
        if config.fine_tune and not config.checkpoint:
            raise Fault("fine_tune= trains a slide encoder further: say which, checkpoint=, or leave it out.")
        if config.direction and not config.checkpoint:
            raise Fault(
                "direction= keeps weights on a slide encoder's vector: say which, checkpoint=, or leave it out."
            )
        if out is not None and out.suffix != ".json":
            raise Fault(f"out={out} must end with .json: the page is written beside it, with .html.")
    page = None if out is None else out.with_suffix(".html")
    if out is not None and page is not None:
        require_writable(out)
        require_writable(page)
    way_out = "choose another out=, or remove it"
    earlier = read_scores(out, way_out, OF_SLIDES) if out is not None and out.exists() else {}
    first, *others = [EmbeddingStore.open(Path(folder)) for folder in config.store]
    store = reduce(EmbeddingStore.with_slides_of, others, first)
    known = {slide: store.rows(slide) for slide in store.slides}
    labelled = read_labels(Path(config.labels), config.label, known, config.cases)
    for sentence in labelled.said:
        say(sentence)
    if config.direction:
        require_one_output(labelled)
        require_writable(Path(config.direction) / WEIGHTS_FILE)
    rounds = rounds_of(labelled, config.folds, config.repeats, config.seed)
    encoder = (
        load_slide_encoder(config.checkpoint, config.device or "", config.allow_plugins) if config.checkpoint else None
    )
    if encoder is not None:
        encoder.require_fits(store)
    question = SlideQuestion(
        folders=config.store,
        store=store,
        labelled=labelled,
        judge=Judge(labelled, rounds, config.seed),
        encoder=encoder,
        how=_how(config, labelled, len(rounds)),
        seed=config.seed,
        precision=config.precision,
        attention=config.attention,
        fine_tune=config.fine_tune,
    )
    kept = not config.direction or (Path(config.direction) / WEIGHTS_FILE).exists()
    if page is not None and page.exists() and kept and earlier.get("question") == question.hash:
        say(f"{out} holds this answer already, nothing to do")
        print(slide_table(earlier))
        return
    found = answers(question, config.tokens, device_of(config.device or ""))
    if config.direction:
        write_direction(Path(config.direction), question, found)
        say(
            f"weights are in {config.direction}: pretrain embed stage=slide maps=sensitivity takes them, as"
            f" direction={config.direction}/{WEIGHTS_FILE} clusters={config.direction}"
        )
    result = as_json(found, question)
    if out is not None and page is not None:
        write_whole(page, slide_probe_page(result, found))
        write_whole(out, json.dumps(result, allow_nan=False) + "\n")
        say(f"written to {out} and {page}")
    print(slide_table(result))


def _how(config: Config, labelled: LabelledSlides, rounds: int) -> list[str]:
    """Sentences about what is done."""
    from pretrain.slide_probing.attention_mil import BAGS_A_STEP
    from pretrain.slide_probing.vectors import DEFAULT_POOLING

    who = "as the table says" if labelled.rounds is not None else f"{config.folds} folds, {config.repeats} times"
    how = [
        f"{rounds} rounds ({who}); a figure is of all that is judged once, averaged over repetitions",
        "in brackets: 95 of 100 draws of a bootstrap over those judged; what was fitted isn't drawn anew, so the truth"
        " lies outside more often: of labels that tell nothing, in 13 to 15 of 100 tables with 60 cases",
        "linear models on standardised vectors: logistic regression (C = 1), ridge, or proportional hazards",
    ]
    if config.checkpoint:
        how.append("clusters of tiles are found without labels, on all of these slides")
    if any(len(bag) > 1 for bag in labelled.bags):
        how.append("of a patient's slides, the mean of their vectors; or attention over them, where a row says so")
    if config.fine_tune:
        how.append(
            f"fine-tuned: {config.fine_tune} steps of {BAGS_A_STEP} cases in each round, all weights, begun as the frozen row"
            f" of {DEFAULT_POOLING}"
        )
    return how
