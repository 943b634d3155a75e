"""The time stamps of a stream, put on this machine's monotonic clock."""

from __future__ import annotations

_HALF_WINDOW_NS = 15_000_000_000
_MOST_REPEATS = 3  # encoders stamp a key frame twice at times; a clock that stands still for longer is none


class MediaClock:
    """When a picture was captured, from its stamp in the stream and the time it arrived.

    No picture arrives before it was captured, and the least delayed ones arrive almost at once. So the least
    difference between arrival and stamp over the last 15 to 30 s tells where the camera's clock stands; the
    window lets it drift, and a picture that was held up on its way is known by its age. What all pictures
    are late by (encoding, the network at its best) cannot be known here and is not in it.
    """

    def __init__(self) -> None:
        self._last_ns = 0
        self._told_ns = 0
        self._repeats = 0
        self._least_ns: int | None = None
        self._least_before_ns: int | None = None
        self._began_ns = 0

    def captured_ns(self, stream_s: float | None, arrived_ns: int) -> int:
        """Monotonic ns, never later than `arrived_ns`, never earlier than for the picture before.

        `stream_s` are seconds by the stream's own clock, whose zero may be anywhere; None, or a clock that
        stands still, gives the time of arrival.
        """
        self._told_ns = min(arrived_ns, max(self._told_ns, self._estimate(stream_s, arrived_ns)))
        return self._told_ns

    def _estimate(self, stream_s: float | None, arrived_ns: int) -> int:
        if stream_s is None:
            return arrived_ns
        stamp_ns, last_ns = int(stream_s * 1e9), self._last_ns
        self._last_ns = stamp_ns
        self._repeats = self._repeats + 1 if stamp_ns == last_ns else 0
        if self._repeats > _MOST_REPEATS:
            return arrived_ns
        if stamp_ns < last_ns:  # the camera started its clock anew
            self._forget()
        return stamp_ns + self._offset(arrived_ns - stamp_ns, arrived_ns)

    def _offset(self, difference_ns: int, arrived_ns: int) -> int:
        """Where the stream's zero lies on our clock: the least of two half windows."""
        if self._least_ns is None or arrived_ns - self._began_ns >= _HALF_WINDOW_NS:
            self._least_before_ns, self._least_ns, self._began_ns = self._least_ns, difference_ns, arrived_ns
        self._least_ns = min(self._least_ns, difference_ns)
        return self._least_ns if self._least_before_ns is None else min(self._least_ns, self._least_before_ns)

    def _forget(self) -> None:
        self._least_ns = self._least_before_ns = None
