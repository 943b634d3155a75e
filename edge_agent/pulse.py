"""A thread's sign of life."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pulse:
    """`beat` at each step of the work, `rest` before waiting for more of it. Written by one thread, read by any."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._rests = True

    def beat(self) -> None:
        self._at = self._clock()
        self._rests = False

    def rest(self) -> None:
        self._at = self._clock()
        self._rests = True

    def silent_s(self, *, has_work: bool = False) -> float:
        """For how long the thread has been at one step, seconds; 0 while it rests, unless it `has_work`."""
        at, rests = self._at, self._rests
        return 0.0 if rests and not has_work else max(0.0, self._clock() - at)
