"""``format=torchscript``: one file that runs where there is PyTorch and nothing else, in C++ too.

<out>/
    encoder.pt                torch.jit.load: images (B, 3, size, size), normalised → class tokens (B, width)
    config.json               size, mean and std of these images, and the width
    README.md                 model card

Debug records in encoder.pt name the source files of what was traced, with their folders: torch.jit.save has no way to
leave them out.
"""

import json
import warnings
from collections.abc import Collection
from pathlib import Path

import torch

from data.files import create_folder_whole
from pretrain.encoders.export.publishing import Exported
from pretrain.encoders.export.tiles import images_to_check, require_same_features, tile_card, vision_transformer
from pretrain.encoders.export.timm import as_timms
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.encoders.run_checkpoint import find_checkpoint

SCRIPT_TOLERANCE = 1e-4


def export_torchscript(checkpoint: Path, out: Path, license: str, plugins: Collection[str] = ()) -> Exported:
    """Write a tile run's teacher as a traced module, unless it is there already. Raises `Fault` where it says something
    else than the teacher, for one image or for several, and for a network that timm can't express.

    What is traced is timm's network with the teacher's weights: ours has gradients of its own, which a trace can't hold.
    """
    found = find_checkpoint(checkpoint, plugins)
    network, preprocessing = vision_transformer(found)
    size, difference = preprocessing.image_size, 0.0
    architecture, arguments, weights = as_timms(network, found.config["model"], size)
    name = out.resolve().name
    use = f"""\
import torch

encoder = torch.jit.load("{name}/encoder.pt").eval()
features = encoder(images)"""

    def fill(folder: Path) -> None:
        import timm

        nonlocal difference
        whole = timm.create_model(architecture, **arguments).eval()
        whole.load_state_dict(weights)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is constant in it, as the size of an image is
            torch.jit.save(torch.jit.trace(whole, images_to_check(2, size)), str(folder / "encoder.pt"))
            loaded = torch.jit.load(str(folder / "encoder.pt"))
            for count in (1, 5):
                images = images_to_check(count, size)
                ours, theirs = network.eval().features(images)[0], loaded(images)
                difference = max(difference, float((theirs - ours).abs().max() / ours.abs().max()))
        require_same_features(difference, SCRIPT_TOLERANCE, found)
        (folder / "config.json").write_text(json.dumps(how_images_come(preprocessing, network.width), indent=2) + "\n")
        card = tile_card(found, network, preprocessing, license, "pytorch", use, name)
        (folder / "README.md").write_text(card)

    new = create_folder_whole(out, fill)
    checked = f"{out}: loads in torch.jit, features within {difference:.1g} of the teacher's"
    return Exported(new, checked, f'torch.jit.load("{out}/encoder.pt")', difference)


def how_images_come(preprocessing: Preprocessing, width: int) -> dict[str, object]:
    """How the file's images are prepared, in numbers."""
    return {
        "image_size": preprocessing.image_size,
        "resize_to": preprocessing.resize_to,
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "width": width,
    }
