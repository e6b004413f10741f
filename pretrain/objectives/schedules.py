"""Values that change over a run, as functions of the step."""

import math


def cosine_then_constant(
    step: int, *, peak: float, final: float, cosine: int, warmup: int = 0, start: float = 0.0
) -> float:
    """Linear from ``start`` to ``peak`` in ``warmup`` steps, a half cosine to ``final`` in ``cosine`` steps, and constant
    from there; without a cosine ``peak`` stays.

    The warm-up reaches ``peak`` on the step after its last (DINOv3's ``linear_warmup_cosine_decay``), `cosine` on its
    last.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    if not cosine:
        return peak
    share = min(1.0, (step - warmup) / max(1, cosine - 1))
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * share))


def ramp(step: int, *, begin: float, end: float) -> float:
    """0 up to step ``begin``, 1 from ``end`` on, linear between."""
    if step >= end:
        return 1.0
    return (step - begin) / (end - begin) if step > begin else 0.0


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
