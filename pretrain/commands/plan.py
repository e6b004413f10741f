"""Say, before a run is started, whether it fits, how long it takes, what it costs and what it must read. Needs no GPU.

Give a run's own settings, those of 'pretrain tile' or 'pretrain slide', and the machines:

    pretrain plan recipe=midnight launch.nodes=4 launch.gpus_per_node=8 hardware=h100_80gb
    pretrain plan recipe=midnight trainer.precision=bf16 trainer.activation_checkpointing=full launch.nodes=4
    pretrain plan recipe=gigapath_slide hardware=a100_80gb launch.nodes=8 trainer.precision=bf16 out=plan.json
    pretrain plan published=true

A step of the real objective in the real sharding is rehearsed on tensors that have shapes and no numbers: its
operations are counted by torch's formulas, and its memory is followed from one operation to the next. Everything
printed is computed; nothing was measured on a GPU. Computed for eager execution: torch.compile changes memory, mostly
to less. Time supposes a share of the peak, which only a run can tell; published runs tell what others got
(published=true).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from data.fault import Fault
from data.files import require_writable, write_whole
from data.redaction import redacted_settings
from models.allowed import ON_DISK
from pretrain.plan import evaluation
from pretrain.plan.batches import Slides
from pretrain.plan.estimate import Estimate, Settings, estimate, parameter_counts
from pretrain.plan.of_a_run import compose_run
from pretrain.plan.published import Implied, PublishedRun, implied
from pretrain.plan.remedies import remedies
from pretrain.plan.run_shape import run_shape
from pretrain.plan.throughput import Input, pace, slide_cost, tile_cost
from pretrain.settings.composition import of_the_command_line
from pretrain.settings.hardware import Machine
from pretrain.settings.ranges import within
from pretrain.training.even_shares import require_even
from pretrain.training.sharding import CHECKPOINTING
from pretrain.training.tile_stage import further_views

GIB = 2**30
GPUS = 8  # of a node, unless launch.gpus_per_node says so


@dataclass
class Launch:
    """``launch:``, of which a plan needs these two."""

    nodes: Annotated[int, within(least=1)]
    gpus_per_node: Annotated[int | None, within(least=1)]


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/plan.yaml``."""

    launch: Launch
    hardware: Machine
    utilisation: Annotated[float | None, within(above=0, most=1)]
    dollars_per_hour: Annotated[float | None, within(least=0)]
    reserve: Annotated[float, within(least=0, below=1)]
    out: Annotated[str | None, ON_DISK]
    published: bool
    slides: Slides
    input: Input
    runs: dict[str, PublishedRun]
    settings: list[str]
    config_dirs: list[str]


def run(config: Config) -> None:
    """Print the plan, and write it where ``out`` says."""
    if config.out is not None:
        require_writable(Path(config.out))
    if config.published:
        rows = [implied(name, run, config.slides) for name, run in config.runs.items()]
        report: Any = [asdict(row) for row in rows]
        text = published_table(rows)
    else:
        report = make_plan(config)
        text = plan_table(report)
    print(text)
    if config.out is not None:
        write_whole(Path(config.out), json.dumps({"computed": report}, indent=2))
        print(f"\nwritten to {config.out}")


def make_plan(config: Config) -> dict[str, Any]:
    """Everything that is known of a run before it starts. Raises Fault where its settings don't divide."""
    machine, launch, slides = config.hardware, config.launch, config.slides
    if slides.largest < slides.tiles:
        raise Fault(
            f"slides.largest={slides.largest} is less than slides.tiles={slides.tiles}, those of a mean slide: raise it."
        )
    gpu = machine.accelerator == "gpu"
    shape = run_shape(compose_run(config.settings, config.config_dirs), config.slides)
    trainer = shape.trainer
    each = launch.gpus_per_node or (GPUS if gpu else 1)
    processes = launch.nodes * each
    together = shape.data.processes_per_slide if shape.stage == "slide" else 1
    settings = Settings(processes, trainer.shard_size or processes, trainer.precision, trainer.activation_checkpointing, trainer.accumulate, together)  # fmt: skip
    peak = machine.peak(settings.precision)
    utilisation = machine.utilisation if config.utilisation is None else config.utilisation
    price = machine.dollars_per_hour if config.dollars_per_hour is None else config.dollars_per_hour
    room = int(machine.memory_gib * GIB * (1 - config.reserve))
    with of_the_command_line():
        require_even(shape, processes)
    known: dict[tuple, Estimate] = {}

    def of(wanted: Settings) -> Estimate:
        key = tuple(vars(wanted).values())
        if key not in known:
            known[key] = estimate(shape, wanted, gpu)
        return known[key]

    found = of(settings)
    usual = estimate(shape, settings, gpu, largest=False) if shape.stage == "slide" else found
    cost = (
        tile_cost(shape.data, further_views(shape.objective, shape.model["patch_size"]), config.input)
        if shape.stage == "tile"
        else slide_cost(slides, config.input)
    )
    judged = (
        evaluation.of_slides(shape, settings, gpu) if shape.stage == "slide" else evaluation.of_tiles(shape, settings)
    )
    speed = pace(
        usual, peak=peak, utilisation=utilisation, dollars_per_hour=price, steps=shape.steps, nodes=launch.nodes,
        processes_per_node=each, sample=(together * cost[0], together * cost[1]), evaluation=judged.flops,
    )  # fmt: skip
    other = {kind: of(replace(settings, checkpointing=kind)).peak for kind in CHECKPOINTING if kind != "selective"}
    fits = found.peak <= room
    tried = (
        []
        if fits
        else list(remedies(settings, launch.nodes, of, lambda one: one.peak <= room, gpu, shape.stage == "slide"))
    )
    return {
        "settings": redacted_settings(config.settings),
        "stage": shape.stage,
        "machine": asdict(machine),
        "processes": processes,
        "run": asdict(settings) | {"steps": shape.steps, "batch": shape.data.batch_size},
        "parameters": parameter_counts(shape),
        "flops_per_sample": {f"{part}, {way}": n / usual.samples for (part, way), n in sorted(usual.flops.items())},
        "samples_per_step_and_process": usual.samples,
        "held_bytes": found.held,
        "peak_bytes": found.peak,
        "peak_bytes_by_part": found.highest,
        "peak_bytes_by_activation_checkpointing": other,
        "room_bytes": room,
        "fits": fits,
        "remedies": [asdict(remedy) for remedy in tried],
        "utilisation": utilisation,
        "peak_tflops": peak / 1e12,
        "dollars_per_hour": price,
        "pace": asdict(replace(speed, unit=f"{shape.stage}s")),
        "slides": asdict(slides) if shape.stage == "slide" else None,
        "evaluation": asdict(judged),
    }


def plan_table(found: dict[str, Any]) -> str:
    """The plan as text for a person."""
    run, machine, speed = found["run"], found["machine"], found["pace"]
    unit, one = speed["unit"], speed["unit"].removesuffix("s")
    flops = found["flops_per_sample"]
    total = sum(flops.values())
    again = sum(count for name, count in flops.items() if name.endswith("again"))
    lines = [
        f"Plan, computed and not measured: {' '.join(found['settings']) or 'the default recipe'}",
        f"  {found['processes']} × {machine['name']}, trainer.precision={run['precision']}, "
        f"trainer.activation_checkpointing={run['checkpointing']}, trainer.accumulate={run['accumulate']}, "
        f"sharded over {run['shard_size']}" + (f", {run['together']} processes a slide" if run["together"] > 1 else ""),
        f"  {run['steps']:,} steps of at most {run['batch']:,} {unit}, {found['samples_per_step_and_process']:g} on each process",
    ]
    if found["slides"]:
        about = found["slides"]
        lines.append(
            f"  supposing {about['tiles']:,} tiles a mean slide, and {about['largest']:,} the largest, which memory has to hold"
        )
    lines += ["", "Parameters (computed)"]
    lines += [f"  {name:<46}{count:>18,}" for name, count in found["parameters"].items()]
    lines += ["", f"Operations a {one} in GFLOP (computed), forward + backward" + (", + again for checkpointing" if again else "")]  # fmt: skip
    parts: dict[str, float] = {}
    for name, count in flops.items():
        part = name.rpartition(", ")[0]
        parts[part] = parts.get(part, 0) + count
    lines += [f"  {name:<46}{count / 1e9:>14,.2f}  {count / total:>6.1%}" for name, count in parts.items() if count]
    lines.append(f"  {'all':<46}{total / 1e9:>14,.2f}")
    lines += ["", "Memory of the first GPU at a step's highest moment, in GiB (computed)"]
    lines += [f"  {name:<46}{size / GIB:>14,.2f}" for name, size in found["peak_bytes_by_part"].items()]
    lines.append(f"  {'all':<46}{found['peak_bytes'] / GIB:>14,.2f}")
    lines.append(
        f"  {'gradients, all held when the optimiser steps':<46}{found['held_bytes']['gradients'] / GIB:>14,.2f}"
    )
    for kind, size in found["peak_bytes_by_activation_checkpointing"].items():
        lines.append(f"  {f'all, with trainer.activation_checkpointing={kind}':<46}{size / GIB:>14,.2f}")
    room = found["room_bytes"] / GIB
    said = f"{machine['memory_gib']} GiB less the reserve leave {room:.1f}"
    if found["fits"]:
        lines += ["", f"It fits: {said}."]
    else:
        lines += ["", f"It doesn't fit: {said}. What to change (computed):"]
        lines += [
            f"  {one['words']:<66}{one['peak'] / GIB:>8,.2f} GiB, {'fits' if one['fits'] else 'not enough'}"
            for one in found["remedies"]
        ]
        if not any(one["fits"] for one in found["remedies"]):
            lines.append("  none of these suffices: a smaller model, batch or crop, or hardware with more memory")
    if run["precision"] == "float32" and machine["accelerator"] == "gpu" and found["fits"]:
        ratio = machine["bf16_tflops"] / machine["float32_tflops"]
        lines.append(f"trainer.precision=bf16 has {ratio:.0f} times the peak, and most GPU runs use it.")
    lines += [
        "",
        f"Time and money (computed), supposing {found['utilisation']:.0%} of the peak of {found['peak_tflops']:g} TFLOP/s: a choice (utilisation=), not a measurement",
        f"  {speed['per_second']:,.1f} {unit}/s, {speed['per_second'] / found['processes']:,.2f} on each process, {speed['step_seconds']:.3g} s a step",
        f"  {speed['hours']:,.1f} hours, {speed['gpu_hours']:,.0f} GPU-hours, {speed['dollars']:,.0f} dollars at {found['dollars_per_hour']:g} an hour and GPU (dollars_per_hour=)",
        _of_evaluation(found),
        *(OF_SLIDES if found["slides"] else []),
        "",
        "Input of each node (computed from costs measured on two shared cores; input= has them)",
        f"  {speed['megabytes_per_second']:,.2f} MB/s to read, {speed['cores']:.2g} cores to {'decode and cut crops' if found['stage'] == 'tile' else 'read embeddings'}",
    ]
    return "\n".join(lines)


def _of_evaluation(found: dict[str, Any]) -> str:
    """What judging itself takes of a run's time, and by which settings."""
    judged, speed = found["evaluation"], found["pace"]
    samples, times, looks = judged["samples"], judged["times"], judged["looks"]
    at_checkpoints = f"{times:,} checkpoints (trainer.checkpoint_every=), at each "
    if found["slides"] and not samples:
        return "  no evaluation: data.validation_fraction=0 holds no slides out"
    if found["slides"]:
        what = (
            f"{at_checkpoints}two forwards on every process of {samples:,} slides "
            f"(data.validation_fraction= of slides.count={found['slides']['count']:,})"
        )
    elif not samples and not looks:
        return "  no evaluation: neither watch.probe nor watch.every is given"
    else:
        probe = (
            f"{at_checkpoints}a forward of {samples:,} labelled tiles (watch.probe_images=)"
            if samples
            else "no watch.probe"
        )
        what = f"{probe}; {looks:,} looks (watch.every=)"
    share = speed["evaluation_hours"] / speed["hours"]
    return f"  of these {speed['evaluation_hours']:,.1f} hours ({share:.1%}) are evaluation: {what}"


OF_SLIDES = [
    "  Prov-GigaPath published 3,072 A100-hours, which by this count are about half a percent of the peak (published=true): its arithmetic doesn't",
    "  explain them, and what else took the time is not published; what is planned here is arithmetic alone, so expect more until a run of yours",
    "  has recorded its flop_utilisation",
]
"""Why the hours that are planned for the slide stage are not to be trusted."""


def published_table(rows: list[Implied]) -> str:
    """Published runs as text for a person."""
    lines = [
        "What published GPU hours imply, computed: operations of our plan over the peak (bf16, dense) in those hours",
        f"{'recipe':<22}{'encoder':>15}{'GFLOP each':>13}{'samples':>16}{'GPU-hours':>11}  {'hardware':<12}{'share of peak':>14}",
    ]
    lines += [
        f"{row.recipe:<22}{row.parameters:>15,}{row.gflops:>13,.1f}{row.samples:>16,}{row.gpu_hours:>11,.0f}  {row.machine:<12}{row.utilisation:>14.1%}"
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "samples: tiles; slides for the slide stage. Hours and samples: configs/plan.yaml. Training alone is counted: what the hours of the lowest",
            "shares went into besides (reading, evaluation, small or padded kernels, waiting) is not published.",
        ]
    )
