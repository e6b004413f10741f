"""What is made small where a model is trained on labels of slides."""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(kind: str, outputs: Tensor, values: Tensor) -> Tensor:
    """Of a model's ``outputs`` (n, K): cross-entropy (a single output is the logit of the second of two classes),
    squared error, or the negative partial likelihood among these cases (Cox), per case."""
    if kind == "classes":
        logits = outputs if outputs.shape[1] > 1 else torch.cat([torch.zeros_like(outputs), outputs], dim=1)
        return F.cross_entropy(logits, values.long())
    if kind == "number":
        return F.mse_loss(outputs[:, 0], values.float())
    risk, time, event = outputs[:, 0], values[:, 0], values[:, 1].float()
    at_risk = torch.where(time[None] >= time[:, None], risk[None], -torch.inf).logsumexp(1)
    return -(event * (risk - at_risk)).mean()
