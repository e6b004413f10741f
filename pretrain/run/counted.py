"""Numbers of things, in words."""


def counted_as(number: int, noun: str, several: str = "") -> str:
    """``1 shard``, ``2 shards``; ``several``: the noun of more than one, where that isn't with an s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"
