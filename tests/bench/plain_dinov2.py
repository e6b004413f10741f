"""A DINOv2 trainer without any care, to set ours beside: what a person writes in an hour around timm's ViT.

    python tests/bench/plain_dinov2.py      the network, crops and batch of ``recipe=small``, one thread

Eager, under bfloat16 autocast; a pass for each crop size; all tokens through all blocks; a plain AdamW. Random images:
no reading, decoding or augmentation. Ends with the tiles that a processor second trains, one JSON line.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.settings.composition import load

STEPS, WARMUP = 16, 3


class Trainer:
    """Student, teacher and optimiser, and one step on random images."""

    def __init__(self) -> None:
        config = load("tile", ["run=none", "data.shards=none", "recipe=small"]).object()
        set_fused_attn(False)  # the kernel's backward in bfloat16 is slow on a CPU: the better for this trainer
        model, head, crops = config.model, config.objective, config.data.crops
        self.tiles, self.views = config.data.batch_size, (crops.global_count, crops.local_count)

        def network() -> tuple[nn.Module, nn.Module]:
            encoder = VisionTransformer(
                img_size=model["image_size"],
                patch_size=model["patch_size"],
                embed_dim=model["width"],
                depth=model["depth"],
                num_heads=model["heads"],
                mlp_ratio=model["feed_forward_width"] / model["width"],
                num_classes=0,
                dynamic_img_size=True,
            )
            hidden, out = head["hidden"], head["bottleneck"]
            layers = [
                nn.Linear(model["width"], hidden),
                nn.GELU(),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Linear(hidden, out),
            ]
            return encoder, nn.ModuleList([nn.Sequential(*layers), nn.Linear(out, head["prototypes"], bias=False)])

        self.student, self.head = network()
        self.teacher, self.teacher_head = network()
        self.mask_token = nn.Parameter(torch.zeros(model["width"]))
        self.trained = [*self.student.parameters(), *self.head.parameters()]
        self.averaged = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        for parameter in self.averaged:
            parameter.requires_grad_(False)
        self.optimiser = torch.optim.AdamW([*self.trained, self.mask_token], lr=1e-4)
        sides = (crops.global_size, crops.local_size)
        self.images = [torch.randn(self.tiles * n, 3, side, side) for n, side in zip(self.views, sides, strict=True)]
        masks, patches = config.data.masks, (crops.global_size // model["patch_size"]) ** 2
        self.masks = torch.rand(len(self.images[0]), patches) < masks.share * (masks.low + masks.high) / 2

    def tokens(self, encoder: nn.Module, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = encoder.patch_embed(images)  # (B, rows, columns, width)
        if masks is not None:
            x = torch.where(masks.view(x.shape[:3]).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return encoder.norm(encoder.blocks(encoder._pos_embed(x)))

    @staticmethod
    def scores(head: nn.Module, tokens: Tensor) -> Tensor:
        mlp, prototypes = head
        return prototypes(F.normalize(mlp(tokens), dim=-1)).float()

    def step(self) -> None:
        wide, narrow = self.images
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                seen = self.tokens(self.teacher, wide)
                cls = F.softmax(self.scores(self.teacher_head, seen[:, 0]) / 0.07, -1).view(
                    self.views[0], self.tiles, -1
                )
                patches = F.softmax(self.scores(self.teacher_head, seen[:, 1:][self.masks]) / 0.07, -1)
            large, small = self.tokens(self.student, wide, self.masks), self.tokens(self.student, narrow)
            guess = F.log_softmax(self.scores(self.head, torch.cat([large[:, 0], small[:, 0]])) / 0.1, -1)
            guess = guess.view(sum(self.views), self.tiles, -1)
            pairs = [(v, s) for v in range(len(cls)) for s in range(len(guess)) if s != v]
            loss = -sum((cls[v] * guess[s]).sum(-1).mean() for v, s in pairs) / len(pairs)
            loss = (
                loss
                - (patches * F.log_softmax(self.scores(self.head, large[:, 1:][self.masks]) / 0.1, -1)).sum(-1).mean()
            )
            for features in large[:, 0].float().chunk(self.views[0]):
                unit = F.normalize(features, dim=-1)
                nearest = (unit @ unit.T - 3 * torch.eye(len(unit))).argmax(1)
                loss = loss - 0.1 * ((unit - unit[nearest]).norm(dim=-1) + 1e-8).log().mean()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 3.0)
        self.optimiser.step()
        torch._foreach_lerp_(self.averaged, [parameter.detach() for parameter in self.trained], 0.01)


def main() -> None:
    torch.set_num_threads(1)
    trainer, seconds = Trainer(), []
    for _ in range(WARMUP + STEPS):
        began = time.process_time()
        trainer.step()
        seconds.append(time.process_time() - began)
    print(json.dumps({"tiles_per_cpu_second": round(trainer.tiles / statistics.median(seconds[WARMUP:]), 1)}))


if __name__ == "__main__":
    main()
