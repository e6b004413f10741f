"""A slide encoder that learns the labels too: what its weights are worth as a start, beside what they know.

In every round anew, from the cases that the round fits on alone. It begins where the frozen row is: the encoder as it
came, and the linear model of its default vector fitted to these cases (Kumar et al. 2022: a head that begins at random
spoils what it is put upon). Then the weights of both learn together, by the loss that the linear model is the least of.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.keyed import rng
from models.slide_network import SlideNetwork
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import of_at_most, on_the_device
from pretrain.embedding.tile_clusters import TileClusters
from pretrain.encoders.frozen import computing_in
from pretrain.objectives.schedules import cosine
from pretrain.slide_probing.attention_mil import BAGS_A_STEP
from pretrain.slide_probing.label_loss import label_loss
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import LinearModel, linear_model, told_by
from pretrain.slide_probing.vectors import DEFAULT_POOLING, POOLING_WORDS

FINE_TUNING_LR, FINE_TUNING_DECAY, FINE_TUNING_CLIP = 3e-4, 1e-2, 1.0
WARMED_UP_IN = 0.1  # of the steps
TOKENS_LEARNED = 16_384  # tiles of a pass with gradients, which want more memory; a larger slide goes alone


@dataclass(frozen=True)
class FineTuning:
    """Predicts as `pretrain.slide_probing.judge` asks, each time by a copy of ``network`` that is trained for ``steps``
    of `BAGS_A_STEP` cases. ``advance`` is told of each.

    The same ``seed`` gives the same predictions, on a CPU bit for bit: order and dropout are keyed by it and the step.
    """

    store: EmbeddingStore
    labelled: LabelledSlides
    network: SlideNetwork
    clusters: TileClusters
    vectors: np.ndarray  # (bags, D): what the network makes of them as it came
    steps: int
    seed: int
    tokens: int
    precision: str
    device: torch.device
    advance: Callable[[], None]

    def __call__(self, fitted: np.ndarray, judged: np.ndarray) -> np.ndarray:
        kind, values = self.labelled.kind, self.labelled.values.copy()
        centre, scale = 0.0, 1.0
        if kind == "number":
            centre, scale = values[fitted].mean(), values[fitted].std() or 1.0
            values = (values - centre) / scale
        start = linear_model(kind, len(self.labelled.classes), self.vectors[fitted], values[fitted])
        network, head = deepcopy(self.network).requires_grad_(True), LinearHead(start).to(self.device)
        learned: list[dict[str, Any]] = [
            {"params": network.parameters(), "weight_decay": FINE_TUNING_DECAY},
            {"params": head.parameters(), "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(learned, lr=FINE_TUNING_LR)
        order, warmup = self._order(fitted), max(1, round(WARMED_UP_IN * self.steps))
        for step in range(self.steps):
            bags = [*islice(order, min(BAGS_A_STEP, len(fitted)))]
            for group in optimiser.param_groups:
                group["lr"] = cosine(
                    step, peak=FINE_TUNING_LR, final=0.0, total=self.steps, warmup=warmup, start=FINE_TUNING_LR / warmup
                )
            optimiser.zero_grad()
            self._backward(network, head, bags, values[bags], step)
            nn.utils.clip_grad_norm_([*network.parameters(), *head.parameters()], FINE_TUNING_CLIP)
            optimiser.step()
            self.advance()
        slides, means = self._slides_of(judged.tolist())
        with torch.no_grad():
            passes = of_at_most([self.store.rows(slide) for slide in slides], self.tokens)
            found = [self._vectors(network, [slides[i] for i in some], None) for some in passes]
            outputs = head(means @ torch.cat(found)).double().cpu().numpy()
        if not np.isfinite(outputs).all():
            raise Fault(
                f"fine_tune={self.steps} ends in numbers that aren't finite: leave it out, or take fewer steps."
            )
        return told_by(kind, outputs) * scale + centre

    def _order(self, fitted: np.ndarray) -> Iterator[int]:
        """The bags of steps, without end: each once before any twice."""
        epochs = (fitted[rng(self.seed, "fine-tuning", epoch).permutation(len(fitted))].tolist() for epoch in count())
        return chain.from_iterable(epochs)

    def _backward(
        self, network: SlideNetwork, head: "LinearHead", bags: list[int], values: np.ndarray, step: int
    ) -> None:
        """Gradients of a step's loss. Where its slides don't fit into one pass, their vectors are found first, and made
        again pass by pass for the gradients that the loss has by them: the same ones, in the memory of one pass."""
        slides, means = self._slides_of(bags)
        seeds = rng(self.seed, "fine-tuning dropout", step).integers(2**62, size=len(slides)).tolist()
        passes = [*of_at_most([self.store.rows(slide) for slide in slides], min(self.tokens, TOKENS_LEARNED))]

        def made(some: Sequence[int]) -> Tensor:
            return self._vectors(network, [slides[i] for i in some], [seeds[i] for i in some])

        with torch.set_grad_enabled(len(passes) == 1):
            found = torch.cat([made(some) for some in passes])
        vectors = found.detach().requires_grad_()
        outputs = head(means @ vectors)
        loss = label_loss(self.labelled.kind, outputs, torch.from_numpy(values).to(self.device))
        (loss + head.penalised()).backward()
        assert vectors.grad is not None
        if len(passes) == 1:
            found.backward(vectors.grad)
            return
        for some in passes:
            made(some).backward(vectors.grad[some])

    def _slides_of(self, bags: Sequence[int]) -> tuple[list[str], Tensor]:
        """The slides of some bags, and the matrix (bags, slides) that takes the means of each one's."""
        slides = [slide for bag in bags for slide in self.labelled.bags[bag]]
        sizes = [len(self.labelled.bags[bag]) for bag in bags]
        means = torch.block_diag(*(torch.full((1, size), 1 / size) for size in sizes))
        return slides, means.to(self.device)

    def _vectors(self, network: SlideNetwork, slides: Sequence[str], seeds: Sequence[int] | None) -> Tensor:
        """(slides, D): their default vectors, with dropout by ``seeds``."""
        x, cells, lengths = on_the_device([self.store.read(slide) for slide in slides], self.device)
        with computing_in(self.precision, self.device):
            seen = network(x, cells, lengths, seeds=seeds, all_layers=True)
        return pooled_vectors(x, lengths, seen, self.clusters)[POOLING_WORDS[DEFAULT_POOLING]]


class LinearHead(nn.Module):
    """A `LinearModel` (D → K) that goes on learning: its weights and its bias, and not what it standardises by."""

    centre: Tensor
    spread: Tensor

    def __init__(self, start: LinearModel) -> None:
        super().__init__()
        centre, spread, weights, bias = (
            torch.from_numpy(np.asarray(one)).float() for one in (start.centre, start.spread, start.weights, start.bias)
        )
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)
        self.weights, self.bias, self.penalty = nn.Parameter(weights), nn.Parameter(bias), start.penalty

    def forward(self, vectors: Tensor) -> Tensor:
        """(n, D) → (n, K)."""
        return (vectors - self.centre) / self.spread @ self.weights + self.bias

    def penalised(self) -> Tensor:
        """What is added to the mean loss."""
        return self.penalty * self.weights.square().sum()
