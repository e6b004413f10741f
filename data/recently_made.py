"""What was made for the last few keys, kept for whoever asks again: open files and slides, permutations of passes."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class RecentlyMade(Generic[Key, Value]):
    """``make(key)`` of up to ``capacity`` keys, for any number of threads. The one made first is dropped first, and
    goes when its last user lets go of it.

    A copy for another process makes its own.
    """

    def __init__(self, make: Callable[[Key], Value], capacity: int) -> None:
        self.make, self.capacity = make, capacity
        self._made: dict[Key, Value] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value:
        """What there is for ``key``, made now where it isn't kept."""
        found = self._made.get(key)
        if found is None:
            found = self.make(key)  # two threads may both make it; one is kept
            with self._lock:
                found = self._made.setdefault(key, found)
                while len(self._made) > self.capacity:
                    self._made.pop(next(iter(self._made)))
        return found

    def drop(self, key: Key) -> None:
        """Keep it no longer."""
        with self._lock:
            self._made.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._made

    def __len__(self) -> int:
        return len(self._made)

    def __reduce__(self) -> tuple[type["RecentlyMade[Key, Value]"], tuple[Callable[[Key], Value], int]]:
        return RecentlyMade, (self.make, self.capacity)
