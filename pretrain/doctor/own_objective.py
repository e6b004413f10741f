"""Can an objective of the user's own be trained? Its networks, and a step of it on tensors without numbers; ours are
tested."""

import sys
import traceback
from typing import Any

from omegaconf import OmegaConf

from data.fault import Fault
from pretrain.doctor.finding import Finding, failed, passed, warned
from pretrain.plan.batches import SupposedSlides
from pretrain.plan.rehearsal import rehearse
from pretrain.plan.run_shape import RunShape
from pretrain.settings import plugins
from pretrain.training.even_shares import settings_by_name


def check_own_objective(config: Any) -> list[Finding]:
    """``config``: that of 'pretrain tile', whose data may lack what it can't do without."""
    target: type = plugins.locate_class(config.objective["_target_"])
    trainer = config.trainer
    if plugins.is_ours(target):
        return []
    data = OmegaConf.create(dict(settings_by_name(config.data)))
    run = RunShape("tile", config.model, config.objective, data, trainer, config.watch, 1, SupposedSlides(0, 0, 0))
    try:
        batch = run.batch(trainer.devices * trainer.nodes, trainer.accumulate)
        rehearse(run.build(dict.fromkeys(run.depths, 1)), batch, processes=1)
    except Fault as fault:
        print(fault.trace, end="", file=sys.stderr)
        return [failed("objective", str(fault))]
    except Exception as error:  # an objective may do what tensors without numbers can't
        said = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return [
            warned(
                "objective",
                f"a step of {target.__name__} can't be rehearsed on tensors without numbers ({said}), so that its loss"
                " can be used shows in the first step",
            )
        ]
    return [
        passed(
            "objective",
            f"{target.__name__} gives networks that can be shared out, and a loss in a step without numbers",
        )
    ]
