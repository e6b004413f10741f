"""What every frozen encoder has: a device, a precision, no gradients, and a fingerprint of its weights."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from data.fault import Fault
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.settings.hardware import allow_tf32

EMBEDDING_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """The device of that name, a GPU or else the CPU where there is none given. Raises `Fault` where this machine
    hasn't it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Fault(
            f"device={name} is not on this machine: it is cpu, or cuda or cuda:1 where PyTorch finds GPUs, and it finds"
            f" {torch.cuda.device_count()}."
        ) from error
    allow_tf32()
    return device


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context in which networks compute in one of `EMBEDDING_PRECISIONS`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, EMBEDDING_PRECISIONS[precision])


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` on ``device``, in evaluation mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)


def fingerprint(module: nn.Module, beside: str = "") -> str:
    """`fingerprint_of` a network's weights, and of what counts ``beside`` them."""
    return fingerprint_of(module.state_dict(), beside)


def fingerprint_prepared(module: nn.Module, preprocessing: Preprocessing, precision: str) -> str:
    """`fingerprint` of a tile encoder: its weights, what is done to images before, and what they are computed in."""
    return fingerprint(module, json.dumps([asdict(preprocessing), precision]))


def fingerprint_of(weights: Mapping[str, Tensor], beside: str = "") -> str:
    """16 hexadecimal digits over what counts ``beside`` the weights, and every weight (name, type, shape, bytes)."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:16]
