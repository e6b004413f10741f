"""A frozen tile encoder from wherever it is: a run, a checkpoint, an exported folder, timm's or transformers' models.

Whatever is loaded carries the preprocessing it was trained with, and a hash of both, so that two embeddings made with
the same hash were made the same way. Weights that can't be had are an error: nothing here ever falls back to random
ones. Random weights are a separate, explicit question (`TileEncoder.random_twin`).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.keyed import rng
from models.formats.published import require_finite
from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.encoders.weight_files import WEIGHT_SUFFIXES, is_transformers, read_json, read_transformers_folder
from pretrain.run import checkpoints
from pretrain.run.folder import read_config
from pretrain.run.progress import say
from pretrain.settings.plugins import build

TEACHER, STUDENT = "teacher.encoder.", "encoder."  # MAE's runs have one network and no teacher
RUN_CONFIG = "config.yaml"
EMBEDDING_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Preprocessing:
    """From a uint8 image to the encoder's input: scale the shorter side, cut the centre, normalise."""

    image_size: int  # pixels a side that the network gets
    resize_to: int  # pixels that the shorter side is scaled to before the central image_size are cut
    mean: tuple[float, ...]  # of the three channels, as is std
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float32 (B, 3, image_size, image_size). Downscaling is antialiased, as PIL does it."""
        x = images.permute(0, 3, 1, 2).float() / 255
        height, width = x.shape[-2:]
        scale = self.resize_to / min(height, width)
        size = (round(height * scale), round(width * scale))
        if size != (height, width):
            x = F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
        x = x[..., top : top + self.image_size, left : left + self.image_size]
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def __str__(self) -> str:
        cut = f", centre {self.image_size} px" if self.resize_to != self.image_size else ""
        numbers = ["/".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std)]
        return f"shorter side to {self.resize_to} px ({self.interpolation}, antialiased){cut}, mean {numbers[0]}, std {numbers[1]}"


@dataclass(frozen=True)
class TileEncoder:
    """A frozen network, its preprocessing and its name.

    ``network`` maps normalised images (B, 3, S, S) to features (B, width): the class token after the final norm for
    the project's own encoders, timm's pooled features for timm's.
    """

    network: Callable[[Tensor], Tensor]
    module: nn.Module
    preprocessing: Preprocessing
    name: str
    source: str
    width: int
    hash: str
    device: torch.device
    precision: str
    make_random: Callable[[int], "tuple[nn.Module, Callable[[Tensor], Tensor]]"]

    @property
    def image_size(self) -> int:
        """Pixels a side that the network gets."""
        return self.preprocessing.image_size

    @torch.inference_mode()
    def start(self, images: Tensor) -> Callable[[], Tensor]:
        """Begin to embed images of one size, uint8 (B, H, W, 3); call what it returns for the features, float32 (B,
        width) on the CPU.

        On a GPU this returns at once, so that the next images can be brought meanwhile.
        """
        x = self.preprocessing(images.to(self.device, non_blocking=True))
        low = self.precision != "float32"
        with torch.autocast(self.device.type, EMBEDDING_PRECISIONS[self.precision]) if low else nullcontext():
            features = self.network(x).float()
        if self.device.type != "cuda":
            return features.cpu
        there = features.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return there

        return wait

    def embed(self, images: Tensor) -> Tensor:
        """Features of images of one size: uint8 (B, H, W, 3) → float32 (B, width), on the CPU."""
        return self.start(images)()

    def embed_each(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features of n images of any sizes, each uint8 (H, W, 3): float32 (n, width). Equal sizes go through together."""
        features = np.empty((len(images), self.width), dtype=np.float32)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        for chosen in by_shape.values():
            features[chosen] = self.embed(torch.from_numpy(np.stack([images[i] for i in chosen]))).numpy()
        return features

    def random_twin(self, seed: int) -> "TileEncoder":
        """The same architecture and preprocessing with random weights, drawn from ``seed`` and nothing else."""
        module, network = self.make_random(int(rng(seed, "random weights").integers(2**62)))
        freeze(module, self.device)
        return replace(
            self,
            module=module,
            network=network,
            name=f"{self.name}, random weights",
            source=f"random weights, seed {seed}",
            hash=fingerprint(module, self.preprocessing, self.precision),
        )


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a tile run and the resolved configuration that made it."""

    folder: Path
    run: Path
    config: dict[str, Any]
    plugins: Collection[str]  # whose classes it may name beside ours


def load_encoder(
    checkpoint: str, device: str = "", precision: str = "float32", plugins: Collection[str] = ()
) -> TileEncoder:
    """The encoder that ``checkpoint`` names: frozen, in evaluation mode, on ``device`` (a GPU where there is one).

    ``checkpoint`` is a tile run's folder (the newest checkpoint's teacher), one of its checkpoint folders, a folder
    that ``pretrain export`` wrote (format timm or transformers), a folder of a transformers Dinov2 model, or the name
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


def device_of(name: str) -> torch.device:
    """The device of that name, a GPU or else the CPU where there is none given. Raises `Fault` where this machine
    hasn't it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Fault(
            f"device={name} is not on this machine: it is cpu, or cuda or cuda:1 where PyTorch finds GPUs, and it finds {torch.cuda.device_count()}."
        ) from error
    return device


def _load(checkpoint: str, device: str, precision: str, plugins: Collection[str]) -> TileEncoder:
    if precision not in EMBEDDING_PRECISIONS:
        raise Fault(f"precision is {' or '.join(EMBEDDING_PRECISIONS)}, not {precision!r}")
    place = device_of(device)
    folder = checkpoints.resolved(Path(checkpoint))
    if folder.is_file() and folder.suffix in WEIGHT_SUFFIXES:
        raise Fault(
            f"{folder} holds weights and doesn't say how images are prepared for them: start a run from it with 'pretrain tile init=', "
            "or give a folder with its configuration"
        )
    if folder.is_dir():
        if is_transformers(folder):
            return transformers_encoder(folder, place, precision)
        if (folder / "config.json").is_file():
            return timm_encoder(f"local-dir:{folder}", place, precision)
        return run_encoder(find_checkpoint(folder, plugins), place, precision)
    return timm_encoder(checkpoint, place, precision)


def find_checkpoint(folder: Path, plugins: Collection[str] = ()) -> RunCheckpoint:
    """The checkpoint that a run's folder (its newest) or a checkpoint folder stands for, with the run's configuration,
    which may name classes of ours and of ``plugins``.

    A run's newest checkpoint that is damaged is passed over, and said. Raises `Fault` where there is none that is
    whole.
    """
    folder = checkpoints.resolved(folder)
    if (folder / RUN_CONFIG).is_file():
        newest, whole = checkpoints.newest(folder), checkpoints.newest_whole(folder)
        if newest is None:
            raise Fault(f"{folder} has no checkpoint yet: run the same training command again until it has saved one")
        if whole is None:
            raise Fault(f"{folder} has no whole checkpoint: {checkpoints.damage(newest)}")
        if whole != newest:
            say(f"{checkpoints.damage(newest)}, so the one before it is taken: {whole}")
        return RunCheckpoint(whole, folder, read_config(folder), plugins)
    for run in folder.resolve().parents[:2]:
        if (run / RUN_CONFIG).is_file():
            if wrong := checkpoints.damage(folder):
                raise Fault(f"{wrong}: give another checkpoint of {run}{checkpoints.whole_before(folder)}.")
            return RunCheckpoint(folder, run, read_config(run), plugins)
    inside = sorted(path.parent.name for path in folder.glob(f"*/{RUN_CONFIG}"))
    hint = (
        f": did you mean {folder / inside[0]}?"
        if inside
        else ": give a run's folder, a checkpoint, or an exported folder"
    )
    raise Fault(f"{folder} holds neither a run (config.yaml) nor an exported encoder (config.json){hint}")


def teacher(found: RunCheckpoint) -> tuple[nn.Module, Preprocessing]:
    """The teacher's network with its weights (MAE: the only one), and the preprocessing that its training used."""
    settings, data = found.config.get("model"), found.config.get("data") or {}
    if not isinstance(settings, dict) or not {"mean", "std", "crops"} <= data.keys():
        raise Fault(
            f"{found.run} is not a tile run (its {RUN_CONFIG} lacks model, or data.mean, std or crops): give a run of 'pretrain tile'"
        )
    weights = checkpoints.read_network(found.folder, TEACHER, STUDENT)
    # Whatever kernel it was trained with: any machine can run this one, and a single crop size needs no other.
    anywhere = settings | {"attention": "sdpa"} if "attention" in settings else settings
    network = build(anywhere, allowed=found.plugins)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise Fault(f"{found.folder} doesn't fit the model in {found.run / RUN_CONFIG} ({error})") from error
    size = evaluation_size(found.config)
    return network, Preprocessing(size, size, tuple(data["mean"]), tuple(data["std"]))


def run_encoder(found: RunCheckpoint, device: torch.device, precision: str) -> TileEncoder:
    """The teacher of a checkpoint as a `TileEncoder`."""
    network, preprocessing = teacher(found)

    def random(seed: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        twin = build(found.config["model"], allowed=found.plugins)
        initialise(twin, seed, "encoder")
        return twin, class_token(twin)

    return TileEncoder(
        network=class_token(network),
        module=freeze(network, device),
        preprocessing=preprocessing,
        name=f"{found.run.resolve().name} ({found.folder.name})",
        source=str(found.folder),
        width=int(found.config["model"]["width"]),
        hash=fingerprint(network, preprocessing, precision),
        device=device,
        precision=precision,
        make_random=random,
    )


def class_token(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, S, S) → the class token after the final norm (B, width)."""
    return lambda images: network.features(images)[0]  # type: ignore[operator]


def timm_encoder(name: str, device: torch.device, precision: str) -> TileEncoder:
    """A model that timm builds and has weights for, as a `TileEncoder`, with the preprocessing that timm records."""
    import timm
    from timm.data import resolve_model_data_config

    module = timm_module(name)
    local = name.startswith("local-dir:")
    config = resolve_model_data_config(module)
    size = config["input_size"][-1]
    if config["interpolation"] not in ("bicubic", "bilinear"):
        raise Fault(f"{name} asks for {config['interpolation']} interpolation; only bicubic and bilinear are supported")
    # timm scales the shorter side to floor(size / crop_pct) before it cuts the centre.
    preprocessing = Preprocessing(
        size, int(size / config["crop_pct"]), tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
    )

    def random(seed: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = timm.create_model(name, pretrained=False, num_classes=0)
        return twin, twin

    return TileEncoder(
        network=module,
        module=freeze(module, device),
        preprocessing=preprocessing,
        name=Path(name.removeprefix("local-dir:")).resolve().name if local else name,
        source=name.removeprefix("local-dir:"),
        width=int(module.num_features),  # type: ignore[arg-type]
        hash=fingerprint(module, preprocessing, precision),
        device=device,
        precision=precision,
        make_random=random,
    )


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
                f"there is no folder {name}: give a run's folder, a checkpoint, an exported folder, or a timm model's name"
            )
        if not timm.is_model(base):
            raise Fault(
                f"{name} is neither a folder here nor a model that timm knows: give a run, an exported folder, or a name of timm.list_models()"
            )
        # timm only warns, and goes on with random weights, where a model has none.
        if not timm.models.is_model_pretrained(name):
            raise Fault(
                f"timm has no pretrained weights for {name}: choose one of timm.list_models({base + '*'!r}, pretrained=True)"
            )
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        cause = (str(error) or type(error).__name__).strip().splitlines()[0]
        remedy = (
            "export it again with 'pretrain export'"
            if local
            else "download it once on a machine that reaches its hub and copy the cache, or save the model to a folder and give that"
        )
        raise Fault(f"the weights of {name.removeprefix('local-dir:')} can't be loaded ({cause}): {remedy}") from error
    return module


def transformers_encoder(folder: Path, device: torch.device, precision: str) -> TileEncoder:
    """A transformers Dinov2 model in a folder as a `TileEncoder`: its pooled output, the class token after the last
    norm."""
    published = read_transformers_folder(folder)
    preprocessing = transformers_preprocessing(folder)
    network = VisionTransformer(**published.settings())
    try:
        weights, _ = published.fit(network)
    except ValueError as error:
        raise Fault(f"{folder}: its weights don't fit its config.json ({error})") from error
    mask_token = {"mask_token": torch.zeros_like(network.mask_token)}  # seen in pretraining only, and not always kept
    network.load_state_dict(mask_token | weights, strict=True)

    def random(seed: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        twin = VisionTransformer(**published.settings())
        initialise(twin, seed, "encoder")
        return twin, class_token(twin)

    return TileEncoder(
        network=class_token(network),
        module=freeze(network, device),
        preprocessing=preprocessing,
        name=folder.resolve().name,
        source=str(folder),
        width=network.width,
        hash=fingerprint(network, preprocessing, precision),
        device=device,
        precision=precision,
        make_random=random,
    )


def transformers_preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing in a transformers folder's ``preprocessor_config.json``. Raises `Fault` for one that we don't
    do."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise Fault(
            f"{folder} has no {path.name}, so nothing says how images are prepared for it: copy that file from where the model is from"
        )
    config = read_json(path)
    resize, crop = config.get("size"), config.get("crop_size")
    resize = resize.get("shortest_edge") if isinstance(resize, dict) else resize
    crop = crop.get("height") if isinstance(crop, dict) else crop
    interpolation = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 0))
    if not (
        config.get("do_resize")
        and config.get("do_center_crop")
        and config.get("do_normalize")
        and resize
        and crop
        and interpolation
    ):
        raise Fault(
            f"{path} asks for something other than: shorter side resized (bicubic or bilinear), centre cut, normalised"
        )
    return Preprocessing(int(crop), int(resize), tuple(config["image_mean"]), tuple(config["image_std"]), interpolation)


def evaluation_size(config: dict[str, Any]) -> int:
    """Pixels a side that a tile run's encoder is used at: those of its global crops, the teacher's only input.

    The model's ``image_size`` may be another: it is the grid that position embeddings are stored at.
    """
    return int(config["data"]["crops"]["global_size"])


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` on ``device``, in evaluation mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)


def fingerprint(module: nn.Module, preprocessing: Preprocessing, precision: str) -> str:
    """16 hexadecimal digits over every weight (name, type, shape, bytes), the preprocessing and the precision."""
    digest = hashlib.sha256(json.dumps([asdict(preprocessing), precision]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
