"""What judging itself costs a run.

The slide stage: at every checkpoint the processes share the held-out slides that judge it (``watch.held_out_slides``),
and pass each forward as often as the objective says (`SlideObjective.evaluation_passes`). The slides are whole, and
nothing is kept for a backward; dropout costs no operations of those that are counted.

The tile stage: at every checkpoint the labelled tiles of ``watch.probe`` go forward once, shared by all processes; at
every look (``watch.every``) so do a sample of the data's slides (`pretrain.training.slide_sample`) and the batch's
global crops, these twice at most: for their features, and by a teacher. A look's heads aren't counted.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.objectives.figures import class_tokens
from pretrain.objectives.interface import SlideObjective
from pretrain.plan.estimate import Settings, estimate
from pretrain.plan.rehearsal import CPU_ATTENTION
from pretrain.plan.run_shape import RunShape
from pretrain.plan.torch_internals import FakeTensorMode
from pretrain.settings import plugins
from pretrain.training import slide_sample

FORWARDS = 2


@dataclass
class Evaluation:
    """Of a whole run."""

    times: int  # checkpoints
    samples: int  # judged at each: slides held out, or labelled tiles
    looks: int
    flops: float  # of a process, all times together
    passes: int = 1  # forwards of each sample


def of_slides(run: RunShape, settings: Settings, fused_attention: bool) -> Evaluation:
    """Of a run of the slide stage that has ``slides.count`` slides, or the fields that it cuts them into."""
    data = run.data
    # Fields overlap by half, so a slide has one for each quarter of a field's cells.
    fields = max(1, round(run.slides.tiles / (data.field_cells / 2) ** 2)) if data.field_cells else 1
    held_out = max(1, round(data.validation_fraction * run.slides.count)) * fields if data.validation_fraction else 0
    slides = min(held_out, run.watch.held_out_slides)
    times = len(judged_steps(run))
    one = data.copy()
    one.update(batch_size=1, lanes=1, batch_tokens=None, crop=1.0)
    # One slide, shared by as many processes as in the run; sharded over so many, which changes no operation.
    alone = replace(
        settings, processes=settings.together, shard_size=settings.together, checkpointing="none", accumulate=1
    )
    found = estimate(replace(run, data=one), alone, fused_attention, largest=False)
    passes: int = plugins.locate_class(run.objective["_target_"], SlideObjective).evaluation_passes
    forward = sum(count for (_, way), count in found.flops.items() if way == "forward")
    own = -(-slides * settings.together // settings.processes)
    return Evaluation(times, slides, 0, passes * times * own * forward, passes)


def of_tiles(run: RunShape, settings: Settings) -> Evaluation:
    """Of a run of the tile stage whose probe, where it has one, has ``watch.probe_images`` tiles."""
    times, judged = len(judged_steps(run)), run.watch.probe_images if run.watch.probe else 0
    looks = run.steps // run.watch.every if run.watch.every else 0
    crops = run.data.crops.global_count * run.data.batch_size
    sample = slide_sample.SLIDES * slide_sample.TILES
    images = times * judged + looks * (sample + FORWARDS * crops)
    return Evaluation(times, judged, looks, images * forward_of_an_image(run) / settings.processes)


def judged_steps(run: RunShape) -> set[int]:
    """The steps after which a run judges itself."""
    every = [step for step in (run.trainer.checkpoint_every, run.trainer.keep_every) if step]
    return {run.steps, *(done for step in every for done in range(step, run.steps + 1, step))}


def forward_of_an_image(run: RunShape) -> int:
    """Operations of the tile encoder on an image of the size of a global crop."""
    size = run.data.crops.global_size
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with FakeTensorMode(), counter:
        class_tokens(plugins.build(run.model).eval(), torch.empty(1, 3, size, size))
    return counter.get_total_flops()
