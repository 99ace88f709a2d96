"""A figure between those that are known, over the logarithm of what it goes with."""

import itertools
import math
from collections.abc import Sequence


def between(known: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at a place: straight lines over its logarithm, the first or last beyond.

    Args:
        known: places above zero, rising, each with its value.
    """
    at = min(max(at, known[0][0]), known[-1][0])
    for (low, first), (high, last) in itertools.pairwise(known):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return (1 - share) * first + share * last
    return known[0][1]  # it is the only one
