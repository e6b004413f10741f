"""How many patches 2000 draws really mask, beside the reference's MaskingGenerator."""

import json
import math
from pathlib import Path

import numpy as np

from data import masks
from data.keyed import rng


def test_block_masks_hit_and_miss_their_targets_as_often_as_the_reference(goldens: Path) -> None:
    path = goldens / "dinov2_block_mask_stats_16x16.json"
    for target, reference in json.loads(path.read_text()).items():
        wanted = int(target)
        ratio = (wanted + 0.5) / 256  # so that int(256 * ratio) is the target
        counts = np.array([masks.blocks(16, 16, ratio, rng(0, wanted, draw)).sum() for draw in range(2000)])
        assert counts.max() <= reference["max"]
        # Means and shares of two samples of 2000 differ by less than four standard errors (a miss is rarely over 10).
        assert abs(counts.mean() - reference["mean"]) < 4 * max(counts.std(), 0.3) * math.sqrt(2 / 2000)
        share = reference["share_exact"]
        assert abs((counts == wanted).mean() - share) < 4 * math.sqrt(2 * share * (1 - share) / 2000)
