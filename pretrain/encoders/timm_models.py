"""timm's models, and folders in its layout, as tile encoders. Weights that can't be had are an error, never random
ones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data.fault import Fault
from data.git_lfs import refuse_pointer
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.tile_encoder import TileEncoder
from pretrain.encoders.weight_files import WEIGHT_SUFFIXES


def timm_encoder(name: str, device: torch.device, precision: str) -> TileEncoder:
    """A model that timm builds and has weights for, as a `TileEncoder`, with the preprocessing that timm records."""
    import timm
    from timm.data import resolve_model_data_config

    module = timm_module(name)
    config = resolve_model_data_config(module)
    size = config["input_size"][-1]
    if config["interpolation"] not in ("bicubic", "bilinear"):
        raise Fault(f"{name} asks for {config['interpolation']} interpolation; only bicubic and bilinear are supported")
    # timm scales the shorter side to floor(size / crop_pct) before it cuts the centre.
    preprocessing = Preprocessing(
        size, int(size / config["crop_pct"]), tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
    )

    def random(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(name, pretrained=False, num_classes=0)

    source = name.removeprefix("local-dir:")
    title = name if source == name else Path(source).resolve().name
    width = int(module.num_features)  # type: ignore[arg-type]
    return TileEncoder(module, pooled, preprocessing, title, source, width, device, precision, random)


def pooled(module: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) → timm's own features (B, width)."""
    return module(images)


def timm_module(name: str) -> nn.Module:
    """The timm model of that name, or in ``local-dir:…``, with its weights. Raises `Fault` where there are none."""
    import timm

    local = name.startswith("local-dir:")
    if local:
        for path in sorted(Path(name.removeprefix("local-dir:")).iterdir()):
            if path.suffix in WEIGHT_SUFFIXES:
                refuse_pointer(path)
    base = name.partition(".")[0]
    if not local and not name.startswith("hf-hub:"):
        if "/" in name or name.startswith("."):
            raise Fault(
                f"there is no folder {name}: give a run's folder, a checkpoint, an exported folder, or a timm model's"
                " name"
            )
        if not timm.is_model(base):
            raise Fault(
                f"{name} is neither a folder here nor a model that timm knows: give a run, an exported folder, or a"
                " name of timm.list_models()"
            )
        # timm only warns, and goes on with random weights, where a model has none.
        if not timm.models.is_model_pretrained(name):
            raise Fault(
                f"timm has no pretrained weights for {name}: choose one of timm.list_models({base + '*'!r},"
                " pretrained=True)"
            )
    if not local and (why := why_not_of_hub(name)):
        raise Fault(
            f"the weights of {name} can't be had ({why}): is the name right? Without a network copy the cache of a machine"
            " that has them, or give a folder that the model was saved to"
        )
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        cause = (str(error) or type(error).__name__).strip().splitlines()[0]
        remedy = (
            "export it again with 'pretrain export'"
            if local
            else "download it once on a machine that reaches its hub and copy the cache, or give a folder"
        )
        raise Fault(f"the weights of {name.removeprefix('local-dir:')} can't be loaded ({cause}): {remedy}") from error
    return module


def why_not_of_hub(name: str) -> str | None:
    """Why a model isn't to be had from Hugging Face's hub, or None where it is, is cached, or lies elsewhere.

    Asked once, since timm's download asks six times, in half a minute, and says no more than that it failed.
    """
    import huggingface_hub as hub
    import timm
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import RepositoryNotFoundError

    repository = name.removeprefix("hf-hub:")
    if repository == name:
        config = timm.models.get_pretrained_cfg(name)
        repository = (config and config.hf_hub_id) or ""
    repository, _, revision = repository.partition("@")
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    if not repository or (Path(hub.constants.HF_HUB_CACHE) / folder / "snapshots").is_dir():
        return None
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json", revision=revision or None))
    except RepositoryNotFoundError:
        return "the hub has no such model, or none that it gives without a token"
    except Exception as error:  # of whatever the hub's library asks by: its own, httpx's, requests'
        return f"asking the hub failed: {(str(error) or type(error).__name__).strip().splitlines()[0]}"
    return None
