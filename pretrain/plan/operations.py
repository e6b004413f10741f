"""Floating-point operations that a tile costs a run, for its record's ``flop_utilisation``: the plan's count, on the
run's own data.

Counted without numbers, before the processes join: a count of a real step would have to run it uncompiled, which rounds
otherwise and may need more memory. What activation checkpointing computes anew is among them, as in the utilisation
that a plan supposes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pretrain.plan.batches import Slides
from pretrain.plan.estimate import Settings, estimate
from pretrain.plan.run_shape import RunShape


def of_a_tile(config: Any, fused_attention: bool) -> float:
    """Of the tile stage: those of the global batch, over its tiles. ``config``: that of 'pretrain tile'."""
    run = RunShape(
        "tile", config.model, config.objective, config.data, config.trainer, config.watch, 1, Slides(0, 0, 0)
    )
    return _of_a_step(run, config, config.trainer.accumulate, fused_attention) / config.data.batch_size


def of_an_embedding(config: Any, width: int, sizes: Sequence[int], fused_attention: bool) -> float:
    """Of the slide stage, of each tile that is left of a slide after the crop. ``config``: that of 'pretrain slide';
    ``sizes``: tiles of its slides before the crop, each of a ``width``.

    A slide costs a part in proportion to its tiles, and a part to their square. Rehearsed is the one slide whose tiles
    cost what tiles do on average over all, which the mean slide's don't.
    """
    typical = round(sum(n * n for n in sizes) / sum(sizes))
    data = replace(config.data, batch_size=1, lanes=1, batch_tokens=None, field_cells=0)
    slides = Slides(width, typical, typical)
    run = RunShape("slide", config.model, config.objective, data, config.trainer, config.watch, 1, slides)
    return _of_a_step(run, config, 1, fused_attention) / sum(run.batch(1, 1).make().lengths)


def _of_a_step(run: RunShape, config: Any, accumulate: int, fused_attention: bool) -> int:
    """Of all processes together, which is what one process alone would compute."""
    trainer = config.trainer
    alone = Settings(1, 1, trainer.precision, trainer.activation_checkpointing, accumulate)
    return sum(estimate(run, alone, fused_attention, largest=False).flops.values())
