"""Files beside an exported encoder by which other code bases take it: one each, and nothing of ours is needed there.

A file finds the encoder in its own folder, whose name is the encoder's. What `timm` needs to prepare an image stands in
``config.json``: the shorter side to ``input_size`` / ``crop_pct``, the centre cut, mean and std.
"""

TRIDENT = '''\
"""This folder's encoder in TRIDENT (github.com/mahmoodlab/TRIDENT), under the folder's name.

    import sys; sys.path.insert(0, "FOLDER"); import in_trident
    from trident.patch_encoder_models import encoder_factory
    encoder = encoder_factory(in_trident.NAME)

Or through its script: python -c "import in_trident, run_batch_of_slides as r; r.main()" --patch_encoder NAME …
"""

from pathlib import Path

import timm
import torch
from trident.patch_encoder_models.load import BasePatchEncoder, encoder_registry

FOLDER = Path(__file__).resolve().parent
NAME = FOLDER.name


class Encoder(BasePatchEncoder):
    def _build(self):
        self.enc_name = NAME
        model = timm.create_model(f"local-dir:{self.weights_path or FOLDER}", pretrained=True).eval()
        prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        return model, prepare, torch.float32


encoder_registry[NAME] = Encoder
'''

EVA = '''\
"""This folder's encoder in eva (github.com/kaiko-ai/eva), registered as slidewright/FOLDER'S NAME.

    import sys; sys.path.insert(0, "FOLDER"); import in_eva
    from eva.vision.models.networks.backbones import backbone_registry
    encoder = backbone_registry.get(in_eva.NAME)()

In eva's YAML files: class_path eva.vision.models.ModelFromRegistry, init_args model_name: NAME; images are prepared with the
mean and std of config.json (NORMALIZE_MEAN, NORMALIZE_STD).
"""

from pathlib import Path

import timm
from eva.vision.models.networks.backbones.registry import backbone_registry

FOLDER = Path(__file__).resolve().parent
NAME = f"slidewright/{FOLDER.name}"


@backbone_registry.register(NAME)
def encoder(out_indices=None, **arguments):
    """Class tokens (B, width); with out_indices feature maps of these blocks, (B, width, rows, columns) each."""
    wanted = {} if out_indices is None else {"features_only": True, "out_indices": out_indices}
    return timm.create_model(f"local-dir:{FOLDER}", pretrained=True, **wanted, **arguments)
'''

CLAM = '''\
"""This folder's encoder for CLAM (github.com/mahmoodlab/CLAM) and code like it: what its models.get_encoder answers.

In extract_features_fp.py, in place of "from models import get_encoder":

    import sys; sys.path.insert(0, "FOLDER")
    from in_clam import get_encoder

The name after --model_name is then not looked at.
"""

from pathlib import Path

import timm

FOLDER = Path(__file__).resolve().parent


def get_encoder(model_name=FOLDER.name, target_img_size=None):
    """The encoder, and how an image is prepared for it; target_img_size is its own, whatever is asked."""
    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
'''

HOSTS = {"in_trident.py": TRIDENT, "in_eva.py": EVA, "in_clam.py": CLAM}
"""By name of the file."""
