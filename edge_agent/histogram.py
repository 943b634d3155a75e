"""How long things took: histograms of bounded memory and error, and windows that forget what is old.

The buckets are a constant factor apart, as in DDSketch (Masson, Rim and Lee, VLDB 2019). One thread records, any may
read at the same time: what it sees is what was recorded up to some moment, and `max_ms` is never less than that. A
second thread that records does no more harm than that one of two durations at the very same time may be lost.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from math import floor, inf, log
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

RELATIVE_ERROR = 0.01
LOWEST_MS = 1e-3
HIGHEST_MS = 3.6e6
WINDOW_S = 60.0

_SLICES = 6
_FACTOR = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SCALE = 1 / log(_FACTOR)
_OFFSET = -log(LOWEST_MS) * _SCALE
_BUCKETS = int(log(HIGHEST_MS) * _SCALE + _OFFSET) + 1
_MIDDLES_MS = LOWEST_MS * _FACTOR ** np.arange(_BUCKETS) * (1 + RELATIVE_ERROR)
"""Of each bucket what is as far, relatively, from its lower end as from its upper one."""


class Histogram:
    """Durations from 1 µs to 1 h, in 1101 buckets: 9 kB whatever comes. What is shorter or longer, or no number, counts
    as the shortest or longest (`clamped`)."""

    __slots__ = ("_counts", "clamped", "max_ms", "sum_ms")

    def __init__(self) -> None:
        self.clamped = 0
        self.max_ms = 0.0
        self.sum_ms = 0.0
        self._counts = array("q", bytes(8 * _BUCKETS))

    def record(self, duration_ms: float) -> None:
        if not LOWEST_MS <= duration_ms <= HIGHEST_MS:
            duration_ms = self._clamp(duration_ms)
        if duration_ms > self.max_ms:
            self.max_ms = duration_ms
        self.sum_ms += duration_ms
        self._counts[int(log(duration_ms) * _SCALE + _OFFSET)] += 1  # last, so that readers find the maximum

    @property
    def count(self) -> int:
        """How many were recorded."""
        return int(self._seen().sum())

    def percentiles_ms(self, *percents: int) -> Sequence[float | None]:
        """Nearest-rank percentiles, each within `RELATIVE_ERROR` of the true one; None of nothing."""
        up_to = self._seen().cumsum()
        count = int(up_to[-1])
        if not count:
            return [None] * len(percents)
        ranks = [max(1, -(-percent * count // 100)) for percent in percents]
        return [min(float(_MIDDLES_MS[place]), self.max_ms) for place in np.searchsorted(up_to, ranks)]

    def at_most(self, limits_ms: Sequence[float]) -> Sequence[int]:
        """How many took no longer than each of these, which are taken to be right within `RELATIVE_ERROR`."""
        up_to = np.concatenate([[0], self._seen().cumsum()])
        return [int(up_to[place]) for place in np.searchsorted(_MIDDLES_MS, limits_ms, side="right")]

    def _clamp(self, duration_ms: float) -> float:
        self.clamped += 1
        return HIGHEST_MS if duration_ms > HIGHEST_MS else LOWEST_MS

    def _seen(self) -> NDArray[np.int64]:
        """A copy: numpy lets other threads run while it works, `array` does not."""
        return np.frombuffer(self._counts[:], np.int64)

    @staticmethod
    def merged(histograms: Iterable[Histogram]) -> Histogram:
        """All of them as one, as if it had seen everything itself."""
        whole = Histogram()
        counts = np.frombuffer(whole._counts, np.int64)
        for one in histograms:
            counts += one._seen()
            whole.max_ms = max(whole.max_ms, one.max_ms)
            whole.sum_ms += one.sum_ms
            whole.clamped += one.clamped
        return whole


class Window(Generic[T]):
    """What was recorded in the last `window_s`, and since the last reset, in bounded memory.

    It is recorded in slices (of what `make` gives) of a sixth of the window by the monotonic clock, and a slice is
    forgotten as a whole: the window reaches back at least five sixths of `window_s`. A clock that stands
    still or runs backwards does not hurt. One thread records; `reset` and the rest are for any.
    """

    def __init__(self, make: Callable[[], T], merge: Callable[[Iterable[T]], T], *, window_s: float = WINDOW_S) -> None:
        self._make = make
        self._merge = merge
        self._slice_s = window_s / _SLICES
        self._lock = threading.Lock()
        self.reset()

    def at(self, now_s: float) -> T:
        """What to record in now."""
        if now_s >= self._ends_s:
            self._turn(floor(now_s / self._slice_s))
        return self._latest

    def recent(self, now_s: float) -> T:
        """What the window holds now."""
        oldest = floor(now_s / self._slice_s) - _SLICES + 1
        _, slices = self._kept
        return self._merge([one for number, one in slices if number >= oldest])

    def total(self) -> T:
        """All since the last reset, or the start."""
        before, slices = self._kept
        return self._merge([before, *(one for _, one in slices)])

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept: tuple[T, Sequence[tuple[int, T]]] = self._make(), ()
            self._latest = self._make()
            self._ends_s = -inf

    def _turn(self, number: int) -> None:
        """Begin a slice, and put those that have left the window with what was before it."""
        with self._lock:
            before, slices = self._kept
            if slices and slices[-1][0] >= number:
                return
            gone = [one for at, one in slices if at <= number - _SLICES]
            if gone:
                before = self._merge([before, *gone])
            self._latest = self._make()
            self._kept = before, (*slices[len(gone) :], (number, self._latest))
            self._ends_s = (number + 1) * self._slice_s


def durations(*, window_s: float = WINDOW_S) -> Window[Histogram]:
    """A window of how long something took."""
    return Window(Histogram, Histogram.merged, window_s=window_s)
