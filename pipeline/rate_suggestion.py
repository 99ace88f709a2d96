"""What a sweep over learning rates suggests: its curve, smoothed, and the rule read off it.

The sweep is Smith's range test (2017, https://arxiv.org/abs/1506.01186, section 3.3) with a rate
that grows exponentially, as fastai has it. There the loss is averaged with weights of 0.98 to the
number of updates ago; over a hundred updates that average lags by so many that its lowest point
says little about the rate that reached it (the quickstart with AdamW: 0.3, where the loss is
lowest at 0.005). Here it is smoothed on both sides, by the distance between rates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of Gauss's curve, in powers of ten of the rate: three updates of a hundred from 1e-6 to 1. From
# 0.1 to 0.3 the suggestion stays the same but for a factor of 1.3 (quickstart, both optimizers).
SMOOTHED_OVER = 0.2
# A sweep has diverged when its smoothed loss is so many times its lowest. fastai waits for 4 times,
# which a loss that begins at the logarithm of the vocabulary hardly ever is.
DIVERGED = 1.5
# Standard deviations of the losses around their curve: a smaller fall or rise may be none.
SEEN = 2.0
# Where half of the fall comes below so many times the first rate, it is the number of updates that
# brings it, and a lower first rate would have another answer.
AT_ONCE = 3.0
# Of the fall from the first to the lowest loss, at the suggested rate. On the quickstart that gives
# what tuning runs gave for Muon and for AdamW (tests/benchmarks/README.md). fastai's rules do not
# for both: a tenth of the lowest is too low by 3 to 6, and the steepest place has no one answer
# where the loss falls in two steps.
SHARE = 0.9

RULE = "the lowest rate at which the loss, smoothed over the rate, has made nine tenths of its fall"


class Point(NamedTuple):
    """An update of a sweep: its rate, and the loss of its rows before it is made."""

    rate: float
    loss: float


class Suggestion(NamedTuple):
    """What one sweep says.

    Attributes:
        rate: the suggested one; None where `why_not` says why there is none.
        half: the lowest rate at which half of the fall is made.
        lowest: the rate at which the loss is lowest.
        why_not: "no fall", "falls at once" (the first rate already teaches), "no rise", or None.
    """

    rate: float | None
    half: float
    lowest: float
    why_not: str | None


def rate_at(step: int, *, start: float, end: float, updates: int) -> float:
    """Return the rate of the update after `step`: from `start` by equal factors to `end`."""
    passed = min(step, updates - 1) / (updates - 1)
    return start * (end / start) ** passed


def smoothed(points: Sequence[Point]) -> list[float]:
    """Return the loss at each rate, averaged with those at rates near it."""
    rates, losses = _arrays(points)
    return _averages(rates, losses).tolist()


def has_diverged(points: Sequence[Point]) -> bool:
    """Tell whether a sweep need not go on: its loss is far above its lowest."""
    curve = smoothed(points)
    return curve[-1] > DIVERGED * min(curve)


def suggested(points: Sequence[Point]) -> Suggestion:
    """Return what a sweep of at least one point suggests; every loss is finite."""
    rates, losses = _arrays(points)
    curve = _averages(rates, losses)
    lowest = int(curve.argmin())
    fall, rise = curve[0] - curve[lowest], curve[lowest:].max() - curve[lowest]
    least = SEEN * float(np.std((losses - curve)[: lowest + 1]))
    made = [int(np.argmax(curve <= curve[0] - share * fall)) for share in (0.5, SHARE)]
    half, rate = (points[place].rate for place in made)
    why_not = None
    if fall <= least:
        why_not = "no fall"
    elif half < AT_ONCE * points[0].rate:
        why_not = "falls at once"
    elif rise <= least:
        why_not = "no rise"
    return Suggestion(None if why_not else rate, half, points[lowest].rate, why_not)


def _arrays(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    rates, losses = np.array(points, np.float64).T
    return np.log10(rates), losses


def _averages(rates: np.ndarray, losses: np.ndarray) -> np.ndarray:
    distances = (rates[:, None] - rates[None]) / SMOOTHED_OVER
    weights = np.exp(-0.5 * distances**2)
    return weights @ losses / weights.sum(axis=1)
