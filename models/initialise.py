"""Initial values, one parameter at a time.

Networks are built on the meta device (a billion parameters in no time and no memory), sharded, and only then filled.
A value depends on (seed, the parameter's name) alone, so it is the same at any world size and does not move when
another part of the network changes.

A *network* is a module with a method ``initialise(name, tensor, generator)`` that fills a full-size float32 CPU tensor
with the initial value of its own parameter or buffer ``name``, and raises KeyError for a name that it doesn't know.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def networks(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The outermost networks inside ``root`` with their names (``""`` for the root itself)."""
    if hasattr(root, "initialise"):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from networks(child, f"{prefix}.{name}" if prefix else name)


def initialise(root: nn.Module, seed: int, prefix: str = "") -> None:
    """`fill` all of ``root``. Raises ValueError naming a parameter that belongs to no network: it would stay
    uninitialised."""
    if missed := fill(root, seed, prefix):
        raise ValueError(f"no network gives {missed[0]!r} an initial value ({len(missed)} such parameters)")


@torch.no_grad()
def fill(root: nn.Module, seed: int, prefix: str = "") -> list[str]:
    """Fill every parameter and persistent buffer of the networks inside ``root``, sharded (DTensor) or plain.

    ``prefix`` is the root's own name where it is a part of something larger, so that two networks of one shape differ.
    Returns the names of those that belong to no network, and weren't filled.
    """
    filled: set[str] = set()
    for path, network in networks(root):
        for name, target in network.state_dict(keep_vars=True).items():
            full_name = f"{path}.{name}" if path else name
            generator = torch.Generator().manual_seed(key(seed, f"{prefix}.{full_name}" if prefix else full_name))
            value = torch.full(target.shape, torch.nan)  # so that a value that isn't filled, or only in part, shows
            network.initialise(name, value, generator)
            assign(target, value)
            filled.add(full_name)
    return sorted(set(root.state_dict()) - filled)


def assign(target: Tensor, value: Tensor) -> None:
    """Copy the full tensor ``value`` (or this rank's shard of it, without communication) into ``target``."""
    if isinstance(target, DTensor):
        shard = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(value)


def key(seed: int, name: str) -> int:
    """A 63-bit seed from (seed, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest(), "big") >> 1
