"""Tissue rules as settings name them: those there are, by name, and a user's own, by class."""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from data.fault import Fault
from data.slides.tissue import TISSUE_RULES, TissueNeeded, TissueRule, tissue_needed
from models.allowed import Allowed
from pretrain.settings import plugins

RULES = Allowed(
    f"{', '.join(TISSUE_RULES)} or {{_target_: CLASS}} of yours",
    lambda value: "_target_" in value if isinstance(value, Mapping) else value in TISSUE_RULES,
)
"""What stands in a list of rules."""


def chosen_rules(given: Sequence[Any], min_tissue: Sequence[float] | None) -> tuple[TissueNeeded, ...]:
    """The rules ``given`` by name, or by class and settings, with the least share of a tile for each; None: their own.
    Raises Fault for shares that don't fit them, and for a class that is no rule or can't be sent to other
    processes."""
    if min_tissue is not None and len(min_tissue) != len(given):
        raise Fault(
            f"min_tissue={list(min_tissue)} is {len(min_tissue)} long, and tissue= {len(given)}: each rule needs a share,"
            " or null takes their own."
        )
    found: list[TissueNeeded] = []
    for number, one in enumerate(given):
        share = None if min_tissue is None else [min_tissue[number]]
        found += tissue_needed([one], share) if isinstance(one, str) else [_own(dict(one), share)]
    return tuple(found)


def _own(settings: dict[str, Any], share: Sequence[float] | None) -> TissueNeeded:
    target = settings["_target_"]
    known = plugins.settings_of(target, TissueRule)
    if unknown := sorted(settings.keys() - known.keys() - {"_target_"}):
        why = plugins.why_unknown(target, unknown[0])
        has = f"it has {', '.join(known) or 'none: settings are the arguments behind a * in its constructor'}."
        raise Fault(f"tissue: {target} has no setting {unknown[0]!r}{f', as {why}' if why else f'; {has}'}")
    rule: TissueRule = plugins.build(settings, base=TissueRule)
    for name in ("mpp", "min_tissue"):
        value = getattr(rule, name, None)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Fault(f"tissue: {target} doesn't say its {name}: give the class a number of that name.")
    if not (math.isfinite(rule.mpp) and rule.mpp > 0):
        raise Fault(f"tissue: {target} has mpp={rule.mpp}: µm per pixel are a finite number above 0.")
    if not 0 <= rule.min_tissue <= 1:
        raise Fault(f"tissue: {target} has min_tissue={rule.min_tissue}: a share is 0 to 1.")
    try:
        with open(os.devnull, "wb") as nothing:
            pickle.dump(rule, nothing)
    except Exception as error:
        raise Fault(
            f"tissue: {target} can't be sent to other processes, as pickle refuses it ({' '.join(str(error).split())}):"
            " keep no lambda, open file or function of a function in it."
        ) from error
    return TissueNeeded(settings, rule, rule.min_tissue if share is None else share[0])
