"""LightlyTrain's DINOv2 on the network, crops, batch and heads of ``recipe=small``; run by `peers.py` in an environment
of its own.

    .venv-peers/bin/python tests/bench/lightly_peer.py '{"tiles": folder, "out": folder, "steps": 80, …}'

What isn't asked for is LightlyTrain's default, its colour above all. Its warm-ups are shortened, since they are longer
than the run. Ends with one JSON line: processor seconds of this process and its workers. With ``judge``,
a list of folders of class folders, it leaves the class tokens of their images before and after training beside ``out``,
under the folders' numbers.
"""

import json
import resource
import sys
from pathlib import Path

import lightly_train
import numpy as np
import torch
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
from PIL import Image

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


def main(asked: dict) -> None:
    """Train, and embed what is to be judged."""
    torch.set_num_threads(1)
    torch.manual_seed(asked["seed"])
    out = Path(asked["out"])
    network = DinoVisionTransformer(
        img_size=asked["size"],
        patch_size=asked["patch"],
        embed_dim=asked["width"],
        depth=asked["depth"],
        num_heads=asked["heads"],
        block_chunks=0,
    )
    network.init_weights()
    for number, folder in enumerate(asked.get("judge", [])):
        np.save(out.with_name(f"{out.name}-random-{number}.npy"), features(network, Path(folder), asked["size"]))
    steps, batch = asked["steps"], asked["batch"]
    images = sum(path.suffix.lower() in SUFFIXES for path in Path(asked["tiles"]).rglob("*"))
    lightly_train.pretrain(
        out=out,
        data=asked["tiles"],
        model=network,
        method="dinov2",
        overwrite=True,
        batch_size=batch,
        num_workers=1,
        devices=1,
        accelerator="cpu",
        precision="bf16-mixed",
        seed=asked["seed"],
        epochs=-(-steps // (images // batch)),
        method_args={
            "output_dim": asked["prototypes"],
            "hidden_dim": asked["hidden"],
            "dino_bottleneck_dim": asked["bottleneck"],
            "ibot_bottleneck_dim": asked["bottleneck"],
            "warmup_steps": asked["warmup"],
            "student_freeze_last_layer_steps": asked["frozen"],
            "teacher_temp_warmup_steps": asked["temperature_warmup"],
        },
        transform_args={
            "image_size": [asked["size"]] * 2,
            "local_view": {"num_views": asked["locals"], "view_size": [asked["local_size"]] * 2},
        },
        trainer_args={"max_steps": steps},
    )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in used)
    if asked.get("judge"):
        # The network that was given is the student's or the teacher's, as the version has it; the export is the
        # teacher's.
        exported = torch.load(out / "exported_models" / "exported_last.pt", map_location="cpu", weights_only=False)
        network.load_state_dict(exported if isinstance(exported, dict) else exported.state_dict())
        for number, folder in enumerate(asked["judge"]):
            np.save(out.with_name(f"{out.name}-trained-{number}.npy"), features(network, Path(folder), asked["size"]))
    print(json.dumps({"cpu_seconds": seconds}))


@torch.inference_mode()
def features(network: DinoVisionTransformer, folder: Path, size: int) -> np.ndarray:
    """Class tokens of all images below a folder, sorted by class and name: float32 (n, width)."""
    network.eval()
    found = []
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    for path in sorted(files, key=lambda path: (path.relative_to(folder).parts[0], path)):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
        x = (pixels.permute(2, 0, 1).float() / 255 - MEAN) / STD
        found.append(network.forward_features(x[None])["x_norm_clstoken"][0].float().numpy())
    network.train()
    return np.stack(found)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
