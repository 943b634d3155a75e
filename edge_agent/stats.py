"""What is counted and timed in the line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edge_agent.data import Names, Prediction, Result
from edge_agent.histogram import Histogram, Window, durations
from edge_agent.messages import Percentiles
from edge_agent.predictions import counted

STAGES = ("capture", "queue", "preprocess", "inference", "postprocess", "encode", "publish", "total")
"""In the order of a frame's way; where each begins and ends is told in docs/mqtt.md."""

_TIMED = ("queue", "preprocess", "inference", "postprocess", "total")  # in a result's own `Timings`


class LineStats:
    """What came out of the line, by camera: results in all, detections in the last one and when it came
    (monotonic seconds); and in the last minute how long each stage of the engine's thread took, and how many frames
    went through the model at once. Written by the engine's thread, read by any."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.inferred: dict[str, int] = {}
        self.detections: dict[str, int] = {}
        self._seen: dict[str, tuple[Prediction, Names]] = {}
        self.last_result: dict[str, float] = {}
        self.stages: Mapping[str, Window[Histogram]] = {stage: durations() for stage in (*_TIMED, "encode")}
        self._batches: Window[Counter[int]] = Window(Counter, _added)
        self._clock = clock

    def record(self, result: Result) -> None:
        now_s, camera = self._clock(), result.frame.camera
        self.inferred[camera] = self.inferred.get(camera, 0) + 1
        self.detections[camera] = len(result.prediction)
        self._seen[camera] = result.prediction, result.model.names
        self.last_result[camera] = now_s
        for stage in _TIMED:
            self.stages[stage].at(now_s).record(getattr(result.timings, f"{stage}_ms"))

    def record_batch(self, size: int) -> None:
        """So many frames went through the model at once."""
        self._batches.at(self._clock())[size] += 1

    def record_encoding(self, took_ms: float) -> None:
        """A result became a message."""
        self.stages["encode"].at(self._clock()).record(took_ms)

    def reset(self) -> None:
        """Forget how long the stages took, and the batches."""
        for window in self.stages.values():
            window.reset()
        self._batches.reset()

    def forget(self, camera: str) -> None:
        """A camera is gone; one of its name that comes later starts anew."""
        for facts in (self.inferred, self.detections, self.last_result, self._seen):
            facts.pop(camera, None)

    def objects(self, camera: str) -> dict[str, int]:
        """What is in the last result, by label."""
        seen = self._seen.get(camera)
        return counted(*seen) if seen else {}

    def batch_sizes(self) -> dict[str, int]:
        """How many batches of each size there were in the last minute, the smallest first."""
        return {str(size): count for size, count in sorted(self._batches.recent(self._clock()).items())}


def percentiles(seen: Histogram) -> Percentiles:
    """What statistics tell of a histogram, in milliseconds."""
    p50, p95, p99 = (None if one is None else round(one, 3) for one in seen.percentiles_ms(50, 95, 99))
    return Percentiles(p50, p95, p99, None if p50 is None else round(seen.max_ms, 3), seen.count)


def _added(counters: Iterable[Counter[int]]) -> Counter[int]:
    whole = Counter[int]()
    for one in counters:
        whole.update(one)
    return whole


@dataclass(slots=True)
class Rate:
    """Events a second between two looks at a counter."""

    clock: Callable[[], float] = time.monotonic
    _at: float | None = None
    _count: int = 0
    _last: float = 0.0

    @classmethod
    def from_zero(cls) -> Rate:
        """A rate of a counter that is at 0 now."""
        rate = cls()
        rate.update(0)
        return rate

    @property
    def last(self) -> float:
        """What the last `update` gave."""
        return self._last

    def update(self, count: int) -> float:
        """The rate since the last call; 0 at the first."""
        now = self.clock()
        elapsed = now - self._at if self._at is not None else 0.0
        rate = (count - self._count) / elapsed if elapsed > 0 else 0.0
        self._at, self._count, self._last = now, count, round(rate, 2)
        return self._last
