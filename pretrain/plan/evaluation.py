"""What judging itself costs a run of the slide stage: at every checkpoint each process passes all held-out slides forward twice.

Once as they are, and once with the visible tiles' places shuffled (`pretrain.objectives.slide_mae.SlideMAE.evaluate`). The slides are whole,
and nothing is kept for a backward; dropout costs no operations of those that are counted.
"""

from dataclasses import dataclass, replace

from pretrain.plan.estimate import Settings, estimate
from pretrain.plan.run_shape import RunShape

FORWARDS = 2


@dataclass
class Evaluation:
    """Of a whole run."""

    times: int
    slides: int  # held out
    flops: float  # of a process, all times together


def evaluation(run: RunShape, settings: Settings, fused_attention: bool) -> Evaluation:
    """Of a run of the slide stage that has ``slides.count`` slides."""
    data, trainer = run.data, run.trainer
    slides = max(1, round(data.validation_fraction * run.slides.count)) if data.validation_fraction else 0
    every = [step for step in (trainer.checkpoint_every, trainer.keep_every) if step]
    times = len({run.steps, *(done for step in every for done in range(step, run.steps + 1, step))})
    one = data.copy()
    one.update(batch_size=1, lanes=1, batch_tokens=None, field_cells=0, crop=1.0)
    # One slide, shared by as many processes as in the run; sharded over so many, which changes no operation.
    alone = replace(
        settings, processes=settings.together, shard_size=settings.together, checkpointing="none", accumulate=1
    )
    found = estimate(replace(run, data=one), alone, fused_attention, largest=False)
    forward = sum(count for (_, way), count in found.flops.items() if way == "forward")
    return Evaluation(times, slides, FORWARDS * times * slides * forward)
