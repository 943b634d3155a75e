"""Picture buffers, used again and again, so that a running line allocates nothing large."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from weakref import WeakValueDictionary

import numpy as np

from edge_agent.data import Image


def new_image(shape: tuple[int, ...]) -> Image:
    """A buffer in ordinary memory."""
    return np.empty(shape, np.uint8)


class FramePool:
    """Lends buffers by shape. Safe to use from every thread.

    How many exist at once is bounded by the queues that hold them; at most `keep()` idle ones stay. What it has
    not lent it does not take: a decoder that makes arrays of its own would fill it with them.

    `allocate` makes the buffers: in pinned memory, where a GPU is to fetch them.
    """

    def __init__(
        self, *, keep: Callable[[], int] = lambda: 32, allocate: Callable[[tuple[int, ...]], Image] = new_image
    ) -> None:
        self._keep = keep
        self._allocate = allocate
        self._idle: deque[Image] = deque()
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
            buffer = self._allocate(shape)
        self._lent[id(buffer)] = buffer
        return buffer

    def exchange(self, buffer: Image, image: Image) -> Image:
        """Where a picture is that its source did not put into `buffer`: there all the same, by a copy, if the buffers
        are of a kind of their own; else where it was, and the buffer goes back."""
        if buffer.flags.owndata:  # ordinary memory, as good as the picture's own
            self.give(buffer)
            return image
        if image.shape != buffer.shape:
            self.give(buffer)
            buffer = self.take(image.shape)
        np.copyto(buffer, image)
        return buffer

    def give(self, buffer: Image) -> None:
        """Take back what was lent. The giver must not touch it any more."""
        if self._lent.pop(id(buffer), None) is buffer:
            self._idle.append(buffer)
            with contextlib.suppress(IndexError):  # another thread was faster
                while len(self._idle) > self._keep():
                    self._idle.popleft()  # the oldest, perhaps of a shape now gone
