"""The forms in which ``pretrain export`` writes an encoder. A new one is a file beside this one, and a line here."""

from collections.abc import Callable, Collection
from pathlib import Path

from pretrain.encoders.export.gigapath import export_gigapath
from pretrain.encoders.export.publishing import Exported
from pretrain.encoders.export.timm import export_timm
from pretrain.encoders.export.torchscript import export_torchscript
from pretrain.encoders.export.transformers import export_transformers

ENCODER_EXPORTS: dict[str, Callable[[Path, Path, str, Collection[str]], Exported]] = {
    "timm": export_timm,
    "transformers": export_transformers,
    "torchscript": export_torchscript,
    "gigapath": export_gigapath,
}
"""By name: from a run or checkpoint into a folder, with a licence; the packages whose classes the run may name beside
ours."""

NOT_WRITTEN = (
    (
        "onnx",
        "no ONNX is written, since what is written is loaded back and compared, and nothing that runs ONNX is among this"
        " project's packages; format=torchscript is one file that needs PyTorch alone",
    ),
)
"""Forms that people look for, each with why it isn't one and what there is."""
