"""Counters and percentiles of the line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.data import Names, Prediction, Result
from edge_agent.messages import Percentiles, percentiles
from edge_agent.predictions import counted

STAGES = ("queue", "preprocess", "inference", "postprocess", "total")
_WINDOW = 1000


class LineStats:
    """What came out of the line, by camera: results in all, detections in the last one and when it came
    (monotonic seconds); and how long each stage took. Written by the
    engine's thread, read by any."""

    def __init__(self) -> None:
        self.inferred: dict[str, int] = {}
        self.detections: dict[str, int] = {}
        self._seen: dict[str, tuple[Prediction, Names]] = {}
        self.last_result: dict[str, float] = {}
        self._stages: dict[str, deque[float]] = {stage: deque(maxlen=_WINDOW) for stage in STAGES}

    def record(self, result: Result) -> None:
        camera = result.frame.camera
        self.inferred[camera] = self.inferred.get(camera, 0) + 1
        self.detections[camera] = len(result.prediction)
        self._seen[camera] = result.prediction, result.model.names
        self.last_result[camera] = time.monotonic()
        timings = result.timings
        for stage in STAGES:
            self._stages[stage].append(getattr(timings, f"{stage}_ms"))

    def reset(self) -> None:
        """Forget how long the stages took."""
        for samples in self._stages.values():
            samples.clear()

    def forget(self, camera: str) -> None:
        """A camera is gone; one of its name that comes later starts anew."""
        for facts in (self.inferred, self.detections, self.last_result, self._seen):
            facts.pop(camera, None)

    def objects(self, camera: str) -> dict[str, int]:
        """What is in the last result, by label."""
        seen = self._seen.get(camera)
        return counted(*seen) if seen else {}

    def stages_ms(self) -> dict[str, Percentiles]:
        """Percentiles over the last 1000 frames."""
        return {stage: percentiles(list(samples)) for stage, samples in self._stages.items()}


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
