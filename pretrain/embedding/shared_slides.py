"""Slides whose work is shared by processes: each computes a share of every slide's tokens (see
`models.sequence_parallel`).

All of them read the same slides and find the same vectors.
"""

from collections.abc import Collection
from pathlib import Path

from data.fault import Fault
from models.sequence_parallel import Group
from models.slide_network import SlideNetwork
from pretrain.encoders.run_checkpoint import RUN_CONFIG
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.folder import read_config
from pretrain.settings.plugins import locate_class


def share_every_slide(encoder: SlideEncoder, group: Group) -> None:
    """Have the processes of ``group`` share every slide that ``encoder`` sees. Raises Fault where its network can't be
    shared so."""
    try:
        encoder.network.encoder.share_slides(group)
    except ValueError as error:
        raise Fault(f"processes_per_slide= doesn't fit {encoder.name}: {error}.") from error


def require_sharing(checkpoint: str, plugins: Collection[str]) -> None:
    """Raise Fault where ``checkpoint`` is a run, or one of its checkpoints, whose kind of network can't be shared."""
    path = Path(checkpoint)
    for run in (path, *path.resolve().parents[:2]):
        if (run / RUN_CONFIG).is_file():
            target = (read_config(run).get("model") or {}).get("_target_", "")
            if target and not (kind := locate_class(target, SlideNetwork, plugins)).shares_slides:
                raise Fault(f"processes_per_slide= doesn't fit {run}: {kind.__name__} can't share a slide.")
            return
