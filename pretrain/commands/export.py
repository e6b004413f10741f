"""Export a trained encoder in the form that other people's code loads.

format=timm writes a tile run's teacher as a folder with config.json, model.safetensors and a model card. It is loaded
back and its features are compared with the teacher's before the folder appears:

    timm.create_model("local-dir:encoder", pretrained=True)

format=transformers does the same with a folder for transformers (to load it back, the package must be installed):

    Dinov2Model.from_pretrained("encoder")            without registers
    Dinov2WithRegistersModel.from_pretrained("encoder")
    DINOv3ViTModel.from_pretrained("encoder")         with rotary positions

format=torchscript writes one file, encoder.pt, that runs where there is PyTorch and nothing else:

    torch.jit.load("encoder/encoder.pt")

A timm folder has in_trident.py, in_eva.py and in_clam.py beside it, by which TRIDENT, eva and CLAM take the encoder. Each folder
is as the Hugging Face hub expects it: huggingface_hub.upload_folder(folder_path="encoder", repo_id=…).

format=gigapath writes a slide run's encoder as slide_encoder.pth, {"model": state dict} with the released key names, and a
model card. At a published size Prov-GigaPath's own code loads the file:

    slide_encoder.create_model("slide_encoder/slide_encoder.pth", "gigapath_slide_enc12l768d", 1536)

Examples:

    pretrain export checkpoint=runs/tile out=encoder
    pretrain export checkpoint=runs/tile/checkpoints/step-00000400 out=encoder license=apache-2.0
    pretrain export checkpoint=runs/slide out=slide_encoder format=gigapath
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.fault import Fault
from data.files import require_writable
from models.allowed import ON_DISK, one_of
from pretrain.encoders.export.formats import ENCODER_EXPORTS, NOT_WRITTEN
from pretrain.run.progress import say


@dataclass
class Config:
    checkpoint: Annotated[str, ON_DISK]
    out: Annotated[str, ON_DISK]
    format: Annotated[str, one_of(*ENCODER_EXPORTS, absent=NOT_WRITTEN)]
    license: str
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Write the export, or say that it is there already."""
    checkpoint, out = Path(config.checkpoint), Path(config.out)
    if not checkpoint.is_dir():
        raise Fault(f"there is no folder {checkpoint}: give a run's folder or one of its checkpoint folders")
    require_writable(out / "config.json")
    exported = ENCODER_EXPORTS[config.format](checkpoint, out, config.license, config.allow_plugins)
    say(exported.checked if exported.new else f"{exported.checked}; it was there already, nothing to do")
    print(exported.use)
