"""Which memory is there when: storages as they come, change their size and go."""

import weakref
from collections import Counter
from collections.abc import Iterator

import torch


class Ledger:
    """Follows storages by phase and kind. Set ``phase`` as it changes."""

    def __init__(self) -> None:
        self.phase = ""
        self.events: list[tuple[str, int, int]] = []  # (phase, storage, bytes more or fewer)
        self.sizes: dict[int, int] = {}  # storage → its bytes
        self.kinds: dict[int, str] = {}
        self.alive: dict[int, weakref.ref] = {}
        self.keys: dict[int, int] = {}  # id of a living storage → its key
        self.count = 0

    def see(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Note that a storage is there, or is another size than before."""
        here = id(storage)
        key = self.keys.get(here)
        size = storage.nbytes()
        if key is None:
            key = self.count = self.count + 1
            self.keys[here], self.sizes[key], self.kinds[key] = key, 0, kind
            self.alive[key] = weakref.ref(storage, lambda _: self._gone(here, key))
        if change := size - self.sizes[key]:
            self.sizes[key] = size
            self.events.append((self.phase, key, change))

    def rename(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Another kind, from its first moment, for a storage that was seen."""
        if (key := self.keys.get(id(storage))) is not None:
            self.kinds[key] = kind

    def forget(self) -> None:
        """Count nothing of what there has been, nor views of it."""
        self.events.clear()

    def highest(self) -> Iterator[dict[str, int]]:
        """Per phase, the bytes by kind at its highest moment."""
        now: Counter[str] = Counter()
        total = most = 0
        phase, highest = None, dict(now)
        for at, key, change in self.events:
            if at != phase:
                if phase is not None:
                    yield highest
                phase, most, highest = at, total, dict(now)
            now[self.kinds[key]] += change
            total += change
            if total > most:
                most, highest = total, dict(now)
        yield highest

    def _gone(self, here: int, key: int) -> None:
        del self.keys[here], self.alive[key]
        if size := self.sizes.pop(key):
            self.events.append((self.phase, key, -size))
