"""Which rows a process goes over, where several share the work.

Rows are cut into the same chunks however many processes there are, and each has some of these, one after another: a row is
compared in the same product on one process as on many, and what they find in their order is what one finds.
"""

from pretrain.run.across_ranks import own_rank, world_size


def own_rows(count: int, size: int) -> tuple[int, int]:
    """The first of ``count`` rows, in chunks of ``size``, that are this process's, and the one behind the last."""
    chunks, ranks = -(-count // size), world_size()
    first, last = (-(-chunks * rank // ranks) * size for rank in (own_rank(), own_rank() + 1))
    return min(count, first), min(count, last)
