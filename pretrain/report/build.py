"""The page, from a folder: find the parts, write their sections, name what is missing."""

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data.files import write_whole
from pretrain.encoders.export.card import parameters_in_words
from pretrain.objectives.interface import Objective, SlideObjective
from pretrain.pages import page
from pretrain.pages.page import Section
from pretrain.report.ending import ending_section
from pretrain.report.parts import Parts, ReportedRun, find_parts, inputs, last_step
from pretrain.report.sections import embeddings_section, how_section, samples_section, slides_section
from pretrain.report.training import (
    ends,
    labels_section,
    last,
    of_what_else,
    probe_section,
    slide_section,
    tile_section,
)
from pretrain.settings import plugins
from pretrain.settings.any_machine import on_any_machine


def build_page(
    folder: Path,
    out: Path,
    shards: Path | None,
    embeddings: Path | None,
    probe: Path | None,
    plugins: Collection[str] = (),
) -> None:
    """Write the page about ``folder`` to ``out``, whole or not at all; ``plugins`` are the packages whose classes its
    runs may name. Raises `Fault` when there is nothing to report."""
    parts = find_parts(folder, shards, embeddings, probe)
    sections = [section for section in found_sections(parts, plugins) if section is not None]
    if wants := wanted(parts, plugins):
        sections.append(Section("missing", "Not here yet", page.missing(wants)))
    text = page.document(
        title=title(parts),
        kicker="Slidewright report",
        lead=lead(parts, plugins),
        opening=page.fact_list(glance(parts)),
        sections=sections,
        footer=(
            f"Written by <code>pretrain report run={page.escape(folder)}</code> on {datetime.now(UTC):%Y-%m-%d %H:%M}"
            " UTC. Not a medical device."
        ),
    )
    write_whole(out, text)


def objective_of(run: ReportedRun, allowed: Collection[str]) -> type[Objective]:
    """The class of a run's objective, which says what it learns; where it isn't known, or not ``allowed``, the one that
    all of its stage derive from."""
    base, named = SlideObjective if "embeddings" in inputs(run) else Objective, run.config.get("objective")
    target = named.get("_target_") if isinstance(named, dict) else None
    return plugins.locate_class(target, base, allowed) if target and plugins.may_be_run(target, allowed) else base


def found_sections(parts: Parts, allowed: Collection[str]) -> list[Section | None]:
    """How a run ended that failed, and then a section for every part that is there, in the order of the road."""
    return [
        ending_section(parts.tile, "tile-ended") if parts.tile else None,
        ending_section(parts.slide, "slide-ended") if parts.slide else None,
        slides_section(parts.shards) if parts.shards else None,
        samples_section(parts.tile) if parts.tile else None,
        tile_section(parts.tile, objective_of(parts.tile, allowed).reading) if parts.tile else None,
        embeddings_section(parts.embeddings, parts.shards) if parts.embeddings else None,
        probe_section(parts.probe, of_what_else(parts.probe, parts.tile)) if parts.probe else None,
        slide_section(parts.slide, objective_of(parts.slide, allowed).reading) if parts.slide else None,
        labels_section(parts.slide_probe) if parts.slide_probe else None,
        how_section(parts),
    ]


def title(parts: Parts) -> str:
    """What the page is about."""
    name = parts.folder.resolve().name
    if parts.tile and parts.slide:
        return f"{name}: from slides to a slide encoder"
    if parts.tile:
        return f"{name}: a tile encoder"
    return f"{name}: a slide encoder" if parts.slide else name


def lead(parts: Parts, allowed: Collection[str]) -> str:
    """One or two sentences on what was trained."""
    sentences = []
    if parts.tile:
        sentences.append(
            f"A tile encoder, {describe_network(parts.tile.config.get('model'), allowed)}, learned"
            f" {objective_of(parts.tile, allowed).learns}."
        )
    if parts.slide:
        sentences.append(
            f"{of_a_kind(parts.slide.config.get('model'))} slide encoder learned"
            f" {objective_of(parts.slide, allowed).learns}."
        )
    return " ".join(sentences) or "Tiles and embeddings; no training run is here yet."


def of_a_kind(model: Any) -> str:
    """The name of a network's class, where it is known, behind its article."""
    kind = model.get("_target_", "").rpartition(".")[2] if isinstance(model, dict) else ""
    return f"An {kind}" if kind.startswith(tuple("AEIO")) else f"A {kind}".strip()


def describe_network(model: Any, allowed: Collection[str]) -> str:
    """A network's architecture in a phrase, its parameters counted without making them."""
    if not isinstance(model, dict) or "_target_" not in model:
        return "its architecture in the configuration below"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in plugins.build(on_any_machine(model), allowed=allowed).parameters())
    kind = model["_target_"].rpartition(".")[2]
    words = {"VisionTransformer": "a vision transformer"}.get(kind, kind)
    shape = [f"{model[key]} {name}" for key, name in (("depth", "blocks"), ("heads", "heads")) if key in model]
    width = [f"width {model['width']}"] if "width" in model else []
    patch = [f"patch {model['patch_size']} px"] if "patch_size" in model else []
    return f"{words} of {parameters_in_words(parameters)} parameters ({', '.join(shape + width + patch)})"


def glance(parts: Parts) -> list[tuple[str, str]]:
    """The numbers to take away."""
    rows = []
    if parts.tile and (change := ends(parts.tile.metrics, "loss")):
        rows.append(("Tile loss", f"{change[0]:.3f} → {change[1]:.3f} in {last_step(parts.tile):,} steps"))
    if parts.probe:
        ours = parts.probe["scores"]["encoder"]
        others = {name: got for name, got in parts.probe["scores"].items() if name != "encoder"}
        beside = ", ".join(f"{name} {got['knn']:.3f}" for name, got in others.items())
        rows.append(("k-NN accuracy", f"{ours['knn']:.3f} ± {ours['knn_se']:.3f} ({beside})"))
        beside = ", ".join(f"{name} {got['linear']:.3f}" for name, got in others.items())
        rows.append(("Linear accuracy", f"{ours['linear']:.3f} ± {ours['linear_se']:.3f} ({beside})"))
    if parts.slide:
        if change := ends(parts.slide.metrics, "loss"):
            rows.append(("Slide loss", f"{change[0]:.3f} → {change[1]:.3f} in {last_step(parts.slide):,} steps"))
        r2, neighbours = last(parts.slide.metrics, "r2"), last(parts.slide.metrics, "r2_neighbours")
        if r2 is not None:
            beside = f" (mean of the nearest visible tiles {neighbours:.3f})" if neighbours is not None else ""
            rows.append(("R² of hidden tiles", f"{r2:.3f}{beside}"))
    return rows


def wanted(parts: Parts, allowed: Collection[str]) -> list[tuple[str, str]]:
    """What the page lacks, and the command that makes it."""
    run = parts.folder
    road = not (run / "config.yaml").is_file()
    tile = parts.tile.folder if parts.tile else run / "tile"
    shards, embeddings = parts.shards or run / "shards", parts.embeddings or run / "embeddings"
    again = f"pretrain report run={run}"
    wants = []
    if parts.shards is None and (road or parts.tile):
        wants.append(
            (
                "The slides and their tiles:",
                f"{again} shards=…" if not road else f"pretrain shard slides=… out={shards}",
            )
        )
    if parts.tile is None and road:
        wants.append(("A tile encoder:", f"pretrain tile run={tile} data.shards={shards}"))
    if parts.tile and "loss" not in parts.tile.metrics:
        wants.append(
            (
                "Loss curves (metrics.jsonl holds no loss yet); the same training command goes on:",
                f"pretrain tile run={tile} data.shards={shards}",
            )
        )
    if parts.tile and not parts.tile.samples:
        wants.append(
            (
                "The crops that the network saw, which training writes to samples/ as it starts:",
                f"pretrain tile run={tile} data.shards={shards}",
            )
        )
    if parts.embeddings is None and (road or parts.tile):
        make = f"pretrain embed checkpoint={tile} shards={shards} out={embeddings}"
        wants.append(
            (
                "Tile embeddings as colours on the slide:",
                make if road else f"{make}, then {again} embeddings={embeddings}",
            )
        )
    if parts.probe is None and (road or parts.tile):
        wants.append(("Probe scores:", f"pretrain probe checkpoint={tile} train=DIR out={run / 'probe.json'}"))
    if parts.slide is None and road:
        wants.append(("A slide encoder:", f"pretrain slide run={run / 'slide'} data.embeddings={embeddings}"))
    if (
        parts.slide
        and getattr(objective_of(parts.slide, allowed), "score", "") == "r2"
        and "r2" not in parts.slide.metrics
    ):
        wants.append(
            (
                "R² beside its baselines, which training writes at its first evaluation:",
                f"pretrain slide run={parts.slide.folder} data.embeddings={embeddings}",
            )
        )
    return wants
