"""Values that change over a run, as functions of the step."""

import math


def cosine(
    step: int, *, peak: float, final: float, total: int, warmup: int = 0, start: float = 0.0, frozen: int = 0
) -> float:
    """Zero for ``frozen`` steps, linear from ``start`` to ``peak`` in ``warmup`` steps, then a half cosine to
    ``final``.

    The warm-up reaches ``peak`` on its last step, and from ``total`` on the value stays ``final`` (DINOv2's
    ``CosineScheduler``).
    """
    if step >= total:
        return final
    if step < frozen:
        return 0.0
    step -= frozen
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    share = (step - warmup) / (total - warmup - frozen)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * share))
