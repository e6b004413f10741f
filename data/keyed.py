"""Random numbers that depend on where they are used and on nothing else.

Every random choice in the data path is drawn from ``rng(seed, "what for", position…)``. There is no generator whose
state has to be carried along, saved or restored: the same key gives the same numbers on any rank, in any thread, after
any interruption.
"""

import hashlib

import numpy as np


def rng(*key: int | str) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by ``key``, a few integers and words such as ``(seed, "crops", 1234)``.

    Different keys give independent streams: the 128-bit Philox key is a BLAKE2b hash of the parts, separated so that
    ``(1, 23)`` and ``(12, 3)`` differ, and typed so that ``1`` and ``"1"`` do.
    """
    text = "\x1f".join(part + "\x1e" if isinstance(part, str) else str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def drawn(population: int, count: int, *key: int | str) -> np.ndarray:
    """``count`` of the numbers below ``population`` (all where there are fewer), each as likely, ascending int64: drawn
    with that key, in time and memory of ``count`` and not of ``population``."""
    return np.sort(rng(*key).choice(population, min(count, population), replace=False, shuffle=False))


def place_of_name(name: str) -> float:
    """A name's place in [0, 1), by its hash: those below a share are that share of all names, whatever others there are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
