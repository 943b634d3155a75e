"""Picture buffers, used again and again, so that a running line allocates nothing large."""

from __future__ import annotations

from collections import deque
from weakref import WeakValueDictionary

import numpy as np

from edge_agent.data import Image


class FramePool:
    """Lends buffers by shape. Safe to use from every thread.

    How many exist at once is bounded by the queues that hold them; at most `keep` idle ones stay. What it has
    not lent it does not take: a decoder that makes arrays of its own would fill it with them.
    """

    def __init__(self, *, keep: int = 32) -> None:
        self._idle: deque[Image] = deque(maxlen=keep)  # the oldest, perhaps of a shape now gone, falls out
        self._lent: WeakValueDictionary[int, Image] = WeakValueDictionary()

    def take(self, shape: tuple[int, ...]) -> Image:
        """A buffer of this shape, [height, width, 3] uint8; what it holds is left over."""
        for _ in range(len(self._idle)):
            try:
                buffer = self._idle.pop()
            except IndexError:  # another thread was faster
                continue
            if buffer.shape == shape:
                break
            self._idle.appendleft(buffer)
        else:
            buffer = np.empty(shape, np.uint8)
        self._lent[id(buffer)] = buffer
        return buffer

    def give(self, buffer: Image) -> None:
        """Take back what was lent. The giver must not touch it any more."""
        if self._lent.pop(id(buffer), None) is buffer:
            self._idle.append(buffer)
