"""Whether something grows over time, and how sure one may be of that.

Samples are brought down to one median for each block of time, as long as whatever repeats itself meanwhile, so that a
block is like the next. Through these goes the Theil-Sen line, whose slope has an interval of confidence of its own
(P. K. Sen, JASA 1968), made wider where a block still tells of the next (Yue and Wang, Water Resour. Manage. 2004).
Where it tells a lot, or no interval is left, blocks are taken for steps of a random walk, and the interval is Student's
of its drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["flat", "grows", "cannot tell yet"]

CONFIDENCE = 0.99

_MOST_BLOCKS = 400
_FEWEST_STEPS = 8
_WANDERS = 0.7
_MOST_CORRELATED = 0.9
_ALMOST = 0.1  # of a block, that a whole one may lack


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth an hour, and the ends of its interval, which are infinite where there are too few blocks for one.
    `span_h` is the time from the first block to the last; `wanders`: it is taken for a random walk."""

    per_h: float
    low: float
    high: float
    level: float
    blocks: int
    span_h: float
    wanders: bool = False

    def verdict(self, most: float) -> Verdict:
        """`flat`: it grows by no more than `most` an hour, for sure. `grows`: it does grow, and perhaps by more."""
        if self.high <= most:
            return "flat"
        return "grows" if self.low > 0 else "cannot tell yet"

    def needed_h(self, most: float) -> float | None:
        """For how long to measure, roughly, until a quantity that does not grow is known to grow by no more than
        `most`: an interval narrows with the time to the power of one and a half. None where nobody knows."""
        half = (self.high - self.low) / 2
        is_known = math.isfinite(half) and not self.wanders
        return self.span_h * max(1.0, half / most) ** (2 / 3) if is_known else None


def fit(at_s: Sequence[float], values: Sequence[float], *, block_s: float, confidence: float = CONFIDENCE) -> Slope:
    """The slope of samples taken at these times, in the values' unit an hour. Raises ValueError of less than two
    blocks."""
    hours, medians = _blocks(np.asarray(at_s, float), np.asarray(values, float), block_s)
    if len(hours) < 2:
        raise ValueError(f"{len(at_s)} samples in {len(hours)} blocks of {block_s:g} s: a slope needs two at least")
    first, second = np.triu_indices(len(hours), 1)
    slopes = np.sort((medians[second] - medians[first]) / (hours[second] - hours[first]))
    middle = float(np.median(slopes))
    correlation = _correlation(medians - middle * hours)
    low, high = _ends(slopes, len(hours), correlation, confidence)
    wanders = len(hours) >= _FEWEST_STEPS and (correlation > _WANDERS or not math.isfinite(high - low))
    if wanders:
        middle, low, high = _drift(np.diff(medians) / np.diff(hours), confidence)
    return Slope(middle, low, high, float(np.median(medians)), len(hours), float(hours[-1] - hours[0]), wanders)


def _blocks(
    at_s: NDArray[np.float64], values: NDArray[np.float64], block_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle of each whole block, in hours, and its median. Long measurements have longer blocks."""
    since_s = at_s - at_s[0] if len(at_s) else at_s
    count = int(since_s[-1] / block_s + _ALMOST) if len(at_s) else 0
    block_s *= max(1, -(-count // _MOST_BLOCKS))
    number = (since_s / block_s).astype(int)
    whole = [one for one in np.unique(number) if since_s[-1] >= (one + 1 - _ALMOST) * block_s]
    return np.array([(one + 0.5) * block_s / 3600 for one in whole]), np.array(
        [float(np.median(values[number == one])) for one in whole]
    )


def _ends(slopes: NDArray[np.float64], blocks: int, correlation: float, confidence: float) -> tuple[float, float]:
    """Those of all slopes between which the true one lies with this confidence, from the variance of Kendall's S."""
    variance = blocks * (blocks - 1) * (2 * blocks + 5) / 18 * (1 + correlation) / (1 - correlation)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    low, high = math.floor((len(slopes) - reach) / 2) - 1, math.ceil((len(slopes) + reach) / 2)
    if low < 0 or high >= len(slopes):
        return -math.inf, math.inf
    return float(slopes[low]), float(slopes[high])


def _drift(steps: NDArray[np.float64], confidence: float) -> tuple[float, float, float]:
    """The mean of the steps, and the ends of its interval; Student's quantile by its expansion about the normal one
    (Abramowitz and Stegun, 26.7.5)."""
    z, freedom = NormalDist().inv_cdf((1 + confidence) / 2), len(steps) - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    mean, half = float(steps.mean()), t * float(steps.std(ddof=1)) / math.sqrt(len(steps))
    return mean, mean - half, mean + half


def _correlation(residuals: NDArray[np.float64]) -> float:
    """Of each block with the next, where it is positive. An estimate from few blocks is too low by about 4 / n."""
    centred = residuals - residuals.mean()
    power = float(centred @ centred)
    if power <= 1e-12 * float(np.abs(residuals).max(initial=0.0) ** 2 + 1e-300) * len(residuals):
        return 0.0
    found = float(centred[1:] @ centred[:-1]) / power + 4 / len(residuals)
    return min(max(found, 0.0), _MOST_CORRELATED)
