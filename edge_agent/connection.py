"""How good a camera's connection has been over the last hour, in bounded memory."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.errors import SourceReason
from edge_agent.histogram import durations

_BUCKET_S = 60.0
_BUCKETS = 60


@dataclass(slots=True)
class _Bucket:
    """What happened in one minute; `mean_s` and `squares` are of the intervals between pictures (Welford)."""

    began_s: float
    pictures: int = 0
    reconnects: int = 0
    stalls: int = 0
    intervals: int = 0
    mean_s: float = 0.0
    squares: float = 0.0

    def add_interval(self, interval_s: float) -> None:
        self.intervals += 1
        delta = interval_s - self.mean_s
        self.mean_s += delta / self.intervals
        self.squares += delta * (interval_s - self.mean_s)


@dataclass(frozen=True, slots=True)
class LastHour:
    """`fps`: pictures a second that the camera sent, outages included; `jitter_ms`: standard deviation of the
    time between two pictures. None where nothing was measured."""

    fps: float | None
    reconnects: int
    stalls: int
    jitter_ms: float | None


class ConnectionQuality:
    """Counters since the start, the last hour by minute, and how long pictures took (`capture`). Pictures are counted
    and timed by the camera's own thread, the rest by the event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.captured = 0
        self.skipped = 0
        self.reconnects = 0
        self.stalls = 0
        self.abandoned = 0
        self.last_reason: SourceReason | None = None
        self.first_frame_ms: float | None = None
        self.nominal_fps: float | None = None
        self.capture = durations()
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: deque[_Bucket] = deque([_Bucket(clock())], maxlen=_BUCKETS)
        self._previous_ns: int | None = None

    def next_seq(self) -> int:
        """The number of the next captured frame, from 0."""
        self.captured += 1
        return self.captured - 1

    def on_picture(self, captured_ns: int, now_s: float) -> None:
        """A picture came off the camera, wanted or not."""
        bucket = self._bucket(now_s)
        bucket.pictures += 1
        if self._previous_ns is not None:
            bucket.add_interval((captured_ns - self._previous_ns) / 1e9)
        self._previous_ns = captured_ns

    def on_delivery(self, took_ms: float, now_s: float) -> None:
        """A picture was read and decoded, and goes into the queue."""
        self.capture.at(now_s).record(took_ms)

    def on_connect(self) -> None:
        """A new connection: the gap before its first picture is no jitter."""
        self._previous_ns = None

    def on_stall(self) -> None:
        self.stalls += 1
        self._bucket(self._clock()).stalls += 1

    def on_loss(self, reason: SourceReason) -> None:
        """The connection is gone, or was not made."""
        self.last_reason = reason
        self.reconnects += 1
        self._bucket(self._clock()).reconnects += 1

    def last_hour(self) -> LastHour:
        """What the last sixty minutes came to, or those since the start."""
        now_s = self._clock()
        recent = [bucket for bucket in list(self._buckets) if now_s - bucket.began_s < _BUCKET_S * _BUCKETS]
        if not recent:
            return LastHour(None, 0, 0, None)
        span_s = now_s - recent[0].began_s
        pictures = sum(bucket.pictures for bucket in recent)
        return LastHour(
            fps=round(pictures / span_s, 2) if span_s > 0 else None,
            reconnects=sum(bucket.reconnects for bucket in recent),
            stalls=sum(bucket.stalls for bucket in recent),
            jitter_ms=_deviation_ms(recent),
        )

    def _bucket(self, now_s: float) -> _Bucket:
        with self._lock:
            last = self._buckets[-1]
            if now_s - last.began_s >= _BUCKET_S:
                began_s = last.began_s + _BUCKET_S * math.floor((now_s - last.began_s) / _BUCKET_S)
                last = _Bucket(began_s)
                self._buckets.append(last)
            return last


def _deviation_ms(buckets: list[_Bucket]) -> float | None:
    """Standard deviation over all buckets (Chan's parallel form)."""
    count, mean_s, squares = 0, 0.0, 0.0
    for bucket in buckets:
        if bucket.intervals:
            total = count + bucket.intervals
            delta = bucket.mean_s - mean_s
            squares += bucket.squares + delta * delta * count * bucket.intervals / total
            mean_s += delta * bucket.intervals / total
            count = total
    return round(math.sqrt(squares / count) * 1e3, 2) if count > 1 else None
