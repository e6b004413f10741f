"""Does one process read fast enough for its share of a run?"""

from pretrain.doctor.finding import Finding, failed, passed, warned


def fast_enough(rate: float, needed: float | None, shares: int, unit: str, does: str, remedy: str) -> Finding:
    """The ``unit`` a second that one process was seen to deliver, against what the run needs over the processes that
    share it.

    ``does``: what it did, "one process reads" say. ``needed`` is None where nobody said it.
    """
    measured = f"{does} {rate:,.1f} {unit}/s (measured here, alone)"
    if needed is None:
        return passed("rate", f"{measured}; say {unit}_per_second= (what all GPUs are to train) to have it judged")
    share = needed / shares
    if rate < share:
        return failed(
            "rate", f"{measured}, and {share:,.1f} are needed ({needed:,.1f} over {shares} processes): {remedy}"
        )
    return (passed if rate > 1.5 * share else warned)("rate", f"{measured}, and {share:,.1f} are needed")
