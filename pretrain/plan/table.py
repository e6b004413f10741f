"""A plan, and what published runs imply, as text for a person."""

from typing import Any

from pretrain.plan.full_plan import GIB
from pretrain.plan.published import Implied


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
        (
            f"  {run['steps']:,} steps of at most {run['batch']:,} {unit}, {found['samples_per_step_and_process']:g} on"
            " each process"
        ),
    ]
    if found["slides"]:
        about = found["slides"]
        lines.append(
            f"  supposing {about['tiles']:,} tiles a mean slide, and {about['largest']:,} the largest, which memory has"
            " to hold"
        )
    lines += ["", "Parameters (computed)"]
    lines += [f"  {name:<46}{count:>18,}" for name, count in found["parameters"].items()]
    lines += [
        "",
        f"Operations a {one} in GFLOP (computed), forward + backward"
        + (", + again for checkpointing" if again else ""),
    ]
    parts: dict[str, float] = {}
    for name, count in flops.items():
        part = name.rpartition(", ")[0]
        parts[part] = parts.get(part, 0) + count
    lines += [f"  {name:<46}{count / 1e9:>14,.2f}  {count / total:>6.1%}" for name, count in parts.items() if count]
    lines.append(f"  {'all':<46}{total / 1e9:>14,.2f}")
    unit_of_cost = "GPU" if machine["accelerator"] == "gpu" else "machine"
    first = "first GPU" if unit_of_cost == "GPU" else "first process"
    lines += ["", f"Memory of the {first} at a step's highest moment, in GiB (computed)"]
    lines += [f"  {name:<46}{size / GIB:>14,.2f}" for name, size in found["peak_bytes_by_part"].items()]
    lines.append(f"  {'all':<46}{found['peak_bytes'] / GIB:>14,.2f}")
    lines.append(
        f"  {'gradients, all held when the optimiser steps':<46}{found['held_bytes']['gradients'] / GIB:>14,.2f}"
    )
    if found["augmentation_bytes"]:
        lines.append(f"  {'augmentation, before the forward':<46}{found['augmentation_bytes'] / GIB:>14,.2f}")
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
    if found["communication"]["calls"]:
        lines += _of_communication(found)
    lines += [
        "",
        (
            f"Time and money (computed), supposing {found['utilisation']:.0%} of the peak of {found['peak_tflops']:g}"
            " TFLOP/s: a choice (utilisation=), not a measurement"
        ),
        *_of_step(found),
        (
            f"  {speed['per_second']:,.1f} {unit}/s, {speed['per_second'] / found['processes']:,.2f} on each process,"
            f" {speed['step_seconds']:.3g} s a step"
        ),
        (
            f"  {speed['hours']:,.1f} hours, {_rounded(speed['gpu_hours'])} {unit_of_cost}-hours,"
            f" {_rounded(speed['dollars'])} dollars at {found['dollars_per_hour']:g} an hour and {unit_of_cost}"
            " (dollars_per_hour=)"
        ),
        _of_evaluation(found),
        *(OF_SLIDES if any("gigapath_slide" in word for word in found["settings"]) else []),
        "",
        "Input of each node (computed from costs measured on two shared cores; input= has them)",
        (
            f"  {speed['megabytes_per_second']:,.2f} MB/s to read, {speed['cores']:.2g} cores to"
            f" {'decode and cut crops' if found['stage'] == 'tile' else 'read embeddings'}"
        ),
    ]
    return "\n".join(lines)


def _rounded(amount: float) -> str:
    """Whole numbers from 10 on, two digits of smaller ones."""
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2g}"


def _of_communication(found: dict[str, Any]) -> list[str]:
    """What a step sends, what it takes, and which sharding is the faster one."""
    machine, sends, step = found["machine"], found["communication"], found["step"]
    lines = [
        "",
        (
            f"Communication of a step and GPU (computed), at {machine['intra_node_gb_s']:g} GB/s to the others of its"
            f" node and {machine['inter_node_gb_s']:g} between nodes"
        ),
    ]
    lines += [f"  {name:<46}{size / 1e9:>14,.3f} GB" for name, size in sends["sent"].items()]
    lines.append(
        f"  {sends['seconds']:.2g} s in {sends['calls']:,} collectives, {sends['exposed']:.2g} s of it exposed: the rest"
        f" hides behind the {step['computing']:.3g} s that a step computes"
    )
    if len(found["shardings"]) > 1:
        lines += [
            f"  {one['words']:<46}{one['peak'] / GIB:>14,.2f} GiB, {'fits' if one['fits'] else 'too much'},"
            f" {one['seconds']:.2g} s, {one['exposed']:.2g} s of it exposed"
            for one in found["shardings"]
        ]
    return [*lines, *([f"  {found['network']}"] if found["network"] else [])]


def _of_step(found: dict[str, Any]) -> list[str]:
    """What a GPU does in a step and what its host does beside it, and which is the slower."""
    step = found["step"]
    if found["compiled"]:
        return [
            (
                f"  the host's time isn't known and not counted: trainer.compile=true starts fewer than the"
                f" {found['operators_per_step']:,} operators of an uncompiled step"
            )
        ]
    if not step["host"]:
        return []
    of_gpu = f"{step['arithmetic']:.2g} s of " + (
        f"products, {step['memory']:.2g} s of reading and writing memory" if step["memory"] else "the GPU"
    )
    lines = [
        (
            f"  of a step: {of_gpu}, and beside them {step['host']:.2g} s of the host"
            f" (operator_us={found['operator_us']:g}): {'the host' if step['waits_for_host'] else 'the GPU'} is the"
            " slower"
        ),
        (
            f"  the host's: {found['operators_per_step']:,} operators of forward and backward, started one by one; the"
            " optimiser comes beside them"
        ),
    ]
    if step["waits_for_host"]:
        idle = 1 - (step["arithmetic"] + step["memory"]) / step["host"]
        way_out = "more samples in a micro-batch"
        if found["stage"] == "tile":
            way_out += ", or trainer.compile=true, which starts fewer,"
        lines.append(f"  bound by the host: the GPU has nothing to do for {idle:.0%} of a step; {way_out} would help")
    return lines


def _of_evaluation(found: dict[str, Any]) -> str:
    """What judging itself takes of a run's time, and by which settings."""
    judged, speed = found["evaluation"], found["pace"]
    samples, times, looks = judged["samples"], judged["times"], judged["looks"]
    at_checkpoints = f"{times:,} checkpoints (trainer.checkpoint_every=), at each "
    if found["slides"] and not samples:
        return "  no evaluation: data.validation_fraction=0 holds no slides out"
    if found["slides"]:
        passes = judged["passes"]
        if not passes:
            return "  no evaluation: the objective passes no held-out slide forward (its evaluation_passes)"
        what = (
            f"{at_checkpoints}{'a forward' if passes == 1 else f'{passes} forwards'} of {samples:,} slides, shared by"
            " the processes (watch.held_out_slides= of"
            f" data.validation_fraction= of slides.count={found['slides']['count']:,})"
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
    (
        "  Prov-GigaPath published 3,072 A100-hours, which by this count are about half a percent of the peak"
        " (published=true): what is planned"
    ),
    (
        "  here doesn't explain them, and what else took the time is not published; expect more until a run of yours has"
        " recorded its flop_utilisation"
    ),
]
"""Why the hours that are planned for the slide stage are not to be trusted."""


def published_table(rows: list[Implied]) -> str:
    """Published runs as text for a person."""
    lines = [
        "What published GPU hours imply, computed: operations of our plan over the peak (bf16, dense) in those hours",
        (
            f"{'recipe':<22}{'encoder':>15}{'GFLOP each':>13}{'samples':>16}{'GPU-hours':>11} "
            f" {'hardware':<12}{'share of peak':>14}"
        ),
    ]
    lines += [
        f"{row.recipe:<22}{row.parameters:>15,}{row.gflops:>13,.1f}{row.samples:>16,}{row.gpu_hours:>11,.0f} "
        f" {row.machine:<12}{row.utilisation:>14.1%}"
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            (
                "samples: tiles; slides for the slide stage. Hours and samples: configs/plan.yaml. Training alone is"
                " counted: what the hours of the lowest"
            ),
            "shares went into besides (reading, evaluation, small or padded kernels, waiting) is not published.",
        ]
    )
