"""A frozen tile encoder from wherever it is: a run, a checkpoint, an exported folder, timm's or transformers' models.

Weights that can't be had are an error: nothing here ever falls back to random ones.
"""

from collections.abc import Collection
from pathlib import Path

from data.fault import Fault
from models.formats.published import require_finite
from pretrain.encoders.frozen import EMBEDDING_PRECISIONS, device_of
from pretrain.encoders.run_checkpoint import find_checkpoint, require_tile_run, run_encoder
from pretrain.encoders.tile_encoder import TileEncoder
from pretrain.encoders.timm_models import timm_encoder
from pretrain.encoders.transformers_folders import transformers_encoder
from pretrain.encoders.weight_files import WEIGHT_SUFFIXES, is_transformers
from pretrain.run import checkpoints


def load_encoder(
    checkpoint: str, device: str = "", precision: str = "float32", plugins: Collection[str] = ()
) -> TileEncoder:
    """The encoder that ``checkpoint`` names: frozen, in evaluation mode, on ``device`` (a GPU where there is one).

    ``checkpoint`` is a tile run's folder (the newest checkpoint's teacher), one of its checkpoint folders, a folder
    that ``pretrain export`` wrote (format timm or transformers), a folder of a transformers Dinov2 or DINOv3 model, or the name
    of a model that timm has pretrained weights for (``hf-hub:…`` included). ``precision`` is ``float32`` or
    ``bfloat16`` (autocast); ``plugins`` are the packages whose classes a run may name beside ours. Raises `Fault` when
    it names nothing, or the weights can't be had, or aren't finite.
    """
    encoder = _load(checkpoint, device, precision, plugins)
    try:
        require_finite(encoder.module.state_dict())
    except ValueError as error:
        raise Fault(f"{checkpoint} is not usable: {error}") from error
    return encoder


def require_no_slide_run(checkpoint: str, plugins: Collection[str] = ()) -> None:
    """Raise Fault for a run of the slide stage, without its weights being read."""
    folder = checkpoints.resolved(Path(checkpoint))
    if folder.is_dir() and not is_transformers(folder) and not (folder / "config.json").is_file():
        require_tile_run(find_checkpoint(folder, plugins))


def _load(checkpoint: str, device: str, precision: str, plugins: Collection[str]) -> TileEncoder:
    if precision not in EMBEDDING_PRECISIONS:
        raise Fault(f"precision is {' or '.join(EMBEDDING_PRECISIONS)}, not {precision!r}")
    place = device_of(device)
    folder = checkpoints.resolved(Path(checkpoint))
    if folder.is_file() and folder.suffix in WEIGHT_SUFFIXES:
        raise Fault(
            f"{folder} holds weights and doesn't say how images are prepared for them: start a run from it with"
            " 'pretrain tile init=', or give a folder with its configuration"
        )
    if folder.is_dir():
        if is_transformers(folder):
            return transformers_encoder(folder, place, precision)
        if (folder / "config.json").is_file():
            return timm_encoder(f"local-dir:{folder}", place, precision)
        return run_encoder(find_checkpoint(folder, plugins), place, precision)
    return timm_encoder(checkpoint, place, precision)
