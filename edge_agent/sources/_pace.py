"""The pace of a source that is not a camera: frames when they are due."""

from __future__ import annotations

import time

_MOST_S = 0.5  # a read must not block for longer, so that stopping is quick


class Pace:
    """Due times `fps` apart; after a hold-up of more than a second the lost ones are not made up for."""

    def __init__(self, fps: float) -> None:
        self._period_s = 1 / fps
        self._due = time.monotonic()

    def is_due(self) -> bool:
        """Wait for the next frame's time, but not long; False if it has not come yet."""
        left = self._due - time.monotonic()
        if left > _MOST_S:
            time.sleep(_MOST_S)
            return False
        time.sleep(max(0.0, left))
        self._due = max(self._due + self._period_s, time.monotonic() - 1.0)
        return True
