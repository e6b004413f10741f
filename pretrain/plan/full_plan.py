"""Everything that is known of a run before it starts: parameters, operations, memory, time, money, input."""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

from data.fault import Fault
from data.redaction import redacted_settings
from pretrain.objectives.interface import SlideObjective
from pretrain.plan import evaluation
from pretrain.plan.batches import tiles_of_crops
from pretrain.plan.communication import communication
from pretrain.plan.composed_run import compose_run
from pretrain.plan.estimate import Estimate, Settings, estimate, parameter_counts
from pretrain.plan.gpu_overhead import gpu_overhead
from pretrain.plan.remedies import remedies
from pretrain.plan.run_shape import RunShape, run_shape
from pretrain.plan.shardings import compare_shardings, verdict
from pretrain.plan.step_time import OF_LARGE_PRODUCTS, StepTime, step_time
from pretrain.plan.throughput import pace, slide_cost, tile_cost
from pretrain.settings.composition import of_the_command_line
from pretrain.settings.plugins import locate_class
from pretrain.training.even_shares import require_even
from pretrain.training.tile_settings import checked_views
from pretrain.training.trainer_settings import CHECKPOINTING

GIB = 2**30
GPUS = 8  # of a node, unless launch.gpus_per_node says so


def make_plan(config: Any) -> dict[str, Any]:
    """The plan for the settings ``config`` of 'pretrain plan'. Raises Fault where the run's settings don't divide."""
    machine, launch, slides = config.hardware, config.launch, config.slides
    if slides.largest < slides.tiles:
        raise Fault(
            f"slides.largest={slides.largest} is less than slides.tiles={slides.tiles}, those of a mean slide:"
            " raise it."
        )
    gpu = machine.accelerator == "gpu"
    shape = run_shape(compose_run(config.settings, config.config_dirs), slides)
    each = launch.gpus_per_node or (GPUS if gpu else 1)
    settings = _settings(shape, launch.nodes * each)
    peak = machine.peak(settings.precision)
    with of_the_command_line():
        try:
            require_even(shape, settings.processes)
        except Fault as fault:
            if launch.gpus_per_node or not gpu:
                raise
            raise Fault(
                f"{fault} The plan supposes {GPUS} GPUs a node, a process on each: launch.gpus_per_node= says otherwise."
            ) from fault
    slide_stage, compiled = shape.stage == "slide", gpu and shape.trainer.compile

    @cache
    def planned(wanted: Settings, largest: bool) -> Estimate:
        found = estimate(shape, wanted, gpu, largest)
        beside = gpu_overhead(found.calls, wanted.processes, found.workspace) if gpu else {}
        return replace(found, highest=found.highest | beside)

    def of(wanted: Settings) -> Estimate:
        return planned(wanted, True)

    in_parts = slide_stage and gpu  # the step's time
    utilisation = config.utilisation or (OF_LARGE_PRODUCTS if in_parts else machine.utilisation)

    def usual_of(wanted: Settings) -> tuple[Estimate, StepTime]:
        found = planned(wanted, not slide_stage)
        return found, step_time(
            found,
            machine,
            each,
            peak=peak,
            utilisation=utilisation,
            operator_us=config.operator_us if gpu and not compiled else 0.0,
            reads_memory=in_parts,
        )

    found = of(settings)
    room = int(machine.memory_gib * GIB * (1 - config.reserve))

    def has_room(one: Estimate) -> bool:
        return one.peak <= room

    fits = has_room(found)
    tried = [] if fits else list(remedies(settings, launch.nodes, of, has_room, gpu, slide_stage))
    usual, step = usual_of(settings)
    ways = list(compare_shardings(settings, each, lambda one: (of(one), usual_of(one)[1]), has_room))
    judged = evaluation.of_slides(shape, settings, gpu) if slide_stage else evaluation.of_tiles(shape, settings)
    price = machine.dollars_per_hour if config.dollars_per_hour is None else config.dollars_per_hour
    megabytes, seconds = _reading_cost(shape, config)
    speed = pace(
        usual,
        step=step,
        dollars_per_hour=price,
        steps=shape.steps,
        nodes=launch.nodes,
        processes_per_node=each,
        sample=(settings.together * megabytes, settings.together * seconds),
        evaluation=judged.flops,
    )
    return {
        "settings": redacted_settings(config.settings),
        "stage": shape.stage,
        "machine": asdict(machine),
        "processes": settings.processes,
        "run": asdict(settings) | {"steps": shape.steps, "batch": shape.data.batch_size},
        "parameters": parameter_counts(shape),
        "flops_per_sample": {f"{part}, {way}": n / usual.samples for (part, way), n in sorted(usual.flops.items())},
        "samples_per_step_and_process": usual.samples,
        "held_bytes": found.held,
        "peak_bytes": found.peak,
        "peak_bytes_by_part": found.highest,
        "peak_bytes_by_activation_checkpointing": {
            kind: of(replace(settings, checkpointing=kind)).peak for kind in CHECKPOINTING if kind != "selective"
        },
        "augmentation_bytes": found.augmentation,
        "room_bytes": room,
        "fits": fits,
        "remedies": [asdict(remedy) for remedy in tried],
        "utilisation": utilisation,
        "operator_us": config.operator_us,
        "step": asdict(step) | {"computing": step.computing, "waits_for_host": step.waits_for_host},
        "operators_per_step": usual.operators,
        "compiled": compiled,
        "communication": asdict(communication(usual, machine, each, step.computing)),
        "shardings": [asdict(one) for one in ways],
        "network": verdict(step.computing, ways),
        "peak_tflops": peak / 1e12,
        "dollars_per_hour": price,
        "pace": asdict(replace(speed, unit=f"{shape.stage}s")),
        "slides": asdict(slides) if slide_stage else None,
        "evaluation": asdict(judged),
    }


def _settings(shape: RunShape, processes: int) -> Settings:
    """What of a run's settings decides its memory and operations, on so many processes."""
    trainer = shape.trainer
    together = shape.data.processes_per_slide if shape.stage == "slide" else 1
    shard_size = trainer.shard_size or processes
    return Settings(
        processes, shard_size, trainer.precision, trainer.activation_checkpointing, trainer.accumulate, together
    )


def tiles_read(shape: RunShape) -> int:
    """Tiles that are read of a mean slide, of a field of it, or for the crops of it."""
    if locate_class(shape.objective["_target_"], SlideObjective).crops:
        return sum(min(n, shape.slides.tiles) for n in tiles_of_crops(shape.data, shape.slides))
    field_cells: int = shape.data.field_cells
    return min(shape.slides.tiles, field_cells**2) if field_cells else shape.slides.tiles


def _reading_cost(shape: RunShape, config: Any) -> tuple[float, float]:
    """Megabytes and core-seconds of a tile or slide."""
    if shape.stage == "slide":
        return slide_cost(config.slides, tiles_read(shape), config.input)
    further = checked_views(shape.objective, shape.model["patch_size"], shape.data.crops)
    return tile_cost(shape.data, further, config.input)
