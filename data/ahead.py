"""Work done in threads a little ahead of its consumer, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in their order, computing at most ``ahead`` results before they are
    asked for.

    ``ThreadPoolExecutor.map`` submits everything at once; over a million tiles that holds a million decoded tiles. An
    exception of ``function`` is raised where its result would have come.
    """
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in islice(remaining, max(1, ahead)))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
