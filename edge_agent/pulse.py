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
        self._found: tuple[float, float] | None = None

    def beat(self) -> None:
        self._at = self._clock()
        self._rests = False

    def rest(self) -> None:
        self._at = self._clock()
        self._rests = True

    def silent_s(self, *, has_work: bool = False) -> float:
        """For how long the thread has been at one step, seconds; while it rests, for how long there has been work that
        it does not take up, as far as was asked. Ask in one thread."""
        at, rests, now = self._at, self._rests, self._clock()
        if not rests:
            return max(0.0, now - at)
        if not has_work:
            self._found = None
            return 0.0
        if self._found is None or self._found[0] != at:
            self._found = at, now
        return now - self._found[1]
