"""Picture buffers, used again and again, so that a running line allocates nothing large."""

from __future__ import annotations

from collections import deque

import numpy as np

from edge_agent.data import Image


class FramePool:
    """Lends buffers by shape. Safe to use from every thread.

    How many exist at once is bounded by the queues that hold them; at most `keep` idle ones stay.
    """

    def __init__(self, *, keep: int = 32) -> None:
        self._idle: deque[Image] = deque(maxlen=keep)  # the oldest, perhaps of a shape now gone, falls out

    def take(self, shape: tuple[int, ...]) -> Image:
        """A buffer of this shape, [height, width, 3] uint8; what it holds is left over."""
        for _ in range(len(self._idle)):
            try:
                buffer = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if buffer.shape == shape:
                return buffer
            self._idle.appendleft(buffer)
        return np.empty(shape, np.uint8)

    def give(self, buffer: Image) -> None:
        """Take a buffer back. The giver must not touch it any more."""
        if buffer.base is None:  # a view would keep its owner's memory alive
            self._idle.append(buffer)
