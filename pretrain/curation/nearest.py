"""The nearest of many centres: by faiss on a CPU, where it is installed, and by torch's product of matrices everywhere
else. Both are exact; faiss doesn't write down all distances, and takes two thirds of the time."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from data.embeddings.clusters import nearest_centres


@cache
def installed_faiss() -> ModuleType | None:
    """faiss, or None where it isn't there."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def nearest_of_many(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) and (K, D) float32 → the nearest centre of each, (n,) int64, and its squared distance, (n,)."""
    faiss = installed_faiss()
    if faiss is None or rows.device.type != "cpu":
        return nearest_centres(rows, centres)
    distances, labels = faiss.knn(rows.numpy(), centres.numpy(), 1)
    return torch.from_numpy(labels[:, 0]), torch.from_numpy(distances[:, 0])
