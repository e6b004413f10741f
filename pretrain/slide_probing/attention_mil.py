"""Attention over tiles, learned from the labels: what supervision reaches where no slide encoder is (Ilse et al. 2018,
gated attention)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.keyed import rng
from pretrain.slide_probing.label_loss import label_loss

ATTENTION_WIDTH = 128
ATTENTION_EPOCHS, BAGS_A_STEP, ATTENTION_LR, ATTENTION_DECAY = 20, 8, 1e-3, 1e-2
MOST_TILES = 4096  # of a bag in a step, drawn anew each time; all of them when it is judged

Read = Callable[[int], np.ndarray]
"""The tiles ``(n, D)`` of a bag by number."""


class GatedAttention(nn.Module):
    """Tiles of bags ``(T, D)`` → outputs ``(B, outputs)``:

    a_i ∝ exp(w · (tanh(V h_i) ⊙ σ(U h_i))) within a bag, h = ReLU(W x), output = C Σ_i a_i h_i
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden, self.gate, self.value = (
            nn.Linear(width, ATTENTION_WIDTH),
            nn.Linear(ATTENTION_WIDTH, ATTENTION_WIDTH),
            nn.Linear(ATTENTION_WIDTH, ATTENTION_WIDTH),
        )
        self.weight, self.out = nn.Linear(ATTENTION_WIDTH, 1), nn.Linear(ATTENTION_WIDTH, outputs)

    def forward(self, tiles: Tensor, lengths: Sequence[int]) -> Tensor:
        hidden = self.hidden(tiles).relu()
        scores = self.weight(self.value(hidden).tanh() * self.gate(hidden).sigmoid())[:, 0]
        shares = torch.cat([some.softmax(0) for some in scores.split(list(lengths))])
        pooled = torch.stack([some.sum(0) for some in (shares[:, None] * hidden).split(list(lengths))])
        return self.out(pooled)


def predicted_by_attention(
    kind: str,
    classes: int,
    read: Read,
    fitted: np.ndarray,
    values: np.ndarray,
    judged: np.ndarray,
    seed: int,
    device: torch.device,
) -> np.ndarray:
    """Train on the bags ``fitted`` with their ``values``, predict for ``judged``, as
    `pretrain.slide_probing.linear.predicted` does."""
    mean, std = _statistics(read, fitted, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng(seed, "attention").integers(2**62)))
        model = GatedAttention(len(mean), classes if kind == "classes" else 1)
    model.to(device)
    centre, scale = (values.mean(), values.std() or 1.0) if kind == "number" else (0.0, 1.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=ATTENTION_LR, weight_decay=ATTENTION_DECAY)

    def outputs(bags: np.ndarray, draw: np.random.Generator | None) -> Tensor:
        parts = []
        for bag in bags.tolist():
            tiles = read(bag)
            if draw is not None and len(tiles) > MOST_TILES:
                tiles = tiles[np.sort(draw.permutation(len(tiles))[:MOST_TILES])]
            parts.append((np.asarray(tiles, dtype=np.float32) - mean) / std)
        return model(torch.from_numpy(np.concatenate(parts)).to(device), [len(part) for part in parts])

    for epoch in range(ATTENTION_EPOCHS):
        draw = rng(seed, "attention", epoch)
        order = draw.permutation(len(fitted))
        for some in np.array_split(order, max(1, len(order) // BAGS_A_STEP)):
            found = outputs(fitted[some], draw)
            loss = label_loss(kind, found, torch.from_numpy((values[some] - centre) / scale).to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        rows = torch.cat([outputs(judged[i : i + 1], None) for i in range(len(judged))])
    if kind == "classes":
        return rows.softmax(1).double().cpu().numpy()
    return rows[:, 0].double().cpu().numpy() * scale + centre


def _statistics(read: Read, bags: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread ``(D,)`` of tiles, by at most a hundred of each bag."""
    sample = []
    for bag in bags.tolist():
        tiles = read(bag)
        chosen = rng(seed, "attention statistics", bag).permutation(len(tiles))[:100]
        sample.append(np.asarray(tiles[np.sort(chosen)], dtype=np.float32))
    tiles = np.concatenate(sample)
    return tiles.mean(0), np.maximum(tiles.std(0), 1e-6)
