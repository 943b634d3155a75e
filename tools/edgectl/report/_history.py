"""Numbers to draw, out of what was heard."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgectl.report._heard import STAGES, FrameTimes, Told
from edgectl.report._plots import Points

_MOST_STEPS = 60
_MACHINE = {"machine": ("host", "memory_used_mb"), "GPU 0": ("gpus", 0, "memory_used_mb")}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed; None of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def by_stage(frames: Iterable[FrameTimes]) -> dict[str, list[float]]:
    """Milliseconds of every frame by stage, the least first."""
    every = list(frames)
    return {stage: sorted(getattr(frame, stage) for frame in every) for stage in STAGES}


def totals(frames: Iterable[FrameTimes]) -> Mapping[str, list[float]]:
    """Milliseconds from capture to the end, by camera."""
    found: dict[str, list[float]] = defaultdict(list)
    for frame in frames:
        found[frame.camera].append(frame.total)
    return dict(sorted(found.items()))


def latency_over_time(frames: Sequence[FrameTimes]) -> Mapping[str, Points]:
    """p50, p95 and p99 of `total`, for each step of time."""
    steps, width_s = _steps(frames)
    found: dict[str, list[tuple[float, float]]] = {"p50": [], "p95": [], "p99": []}
    for index, some in sorted(steps.items()):
        ordered = sorted(frame.total for frame in some)
        for name, points in found.items():
            value = percentile(ordered, int(name[1:]) / 100)
            assert value is not None
            points.append(((index + 0.5) * width_s, value))
    return found


def fps_over_time(frames: Sequence[FrameTimes]) -> Mapping[str, Points]:
    """Frames a second by camera, by when they were captured; the last step, which may be cut short, is left out."""
    steps, width_s = _steps(frames)
    cameras = sorted({frame.camera for frame in frames})
    return {
        camera: [
            ((index + 0.5) * width_s, sum(frame.camera == camera for frame in steps.get(index, ())) / width_s)
            for index in range(max(steps, default=0))
        ]
        for camera in cameras
    }


def stages_over_time(told: Sequence[Told]) -> Mapping[str, Points]:
    """p95 of every stage, as the agent counts it."""
    stages = dict.fromkeys(name for one in told for name in one.stats["stages_ms"])
    return {stage: _gauge(told, ("stages_ms", stage, "p95")) for stage in stages}


def own_memory(told: Sequence[Told]) -> Mapping[str, Points]:
    """Megabytes that the agent's process has."""
    return {"resident": _gauge(told, ("process", "rss_mb"))}


def machine_memory(told: Sequence[Told]) -> Mapping[str, Points]:
    """Megabytes in use of the machine and its first GPU."""
    return {name: _gauge(told, path) for name, path in _MACHINE.items()}


def _gauge(told: Sequence[Told], path: Sequence[str | int]) -> Points:
    """A number of the statistics over time, where it is known; 0 s is the first of them."""
    values = [(one.at - told[0].at, _inside(one.stats, path)) for one in told]
    return [(at, value) for at, value in values if value is not None]


def _inside(value: Any, path: Sequence[str | int]) -> float | None:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return float(value) if isinstance(value, (int, float)) else None


def _steps(frames: Sequence[FrameTimes]) -> tuple[Mapping[int, list[FrameTimes]], float]:
    """The frames by the step of time in which they were captured, and how wide a step is in seconds."""
    if not frames:
        return {}, 1.0
    first = min(frame.captured_at for frame in frames)
    span_s = max(frame.captured_at for frame in frames) - first
    width_s = float(max(1, math.ceil(span_s / _MOST_STEPS)))
    found: dict[int, list[FrameTimes]] = defaultdict(list)
    for frame in frames:
        found[int((frame.captured_at - first) / width_s)].append(frame)
    return found, width_s
