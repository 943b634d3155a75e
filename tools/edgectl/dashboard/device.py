"""What is known of one device, and what of it is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Struct

from edge_agent.messages import CameraStatus, Health, Models, Stats, Status

JobState = Literal["sent", "accepted", "running", "done", "failed"]

_MOST_SAMPLES = 360


class Sample(Struct, frozen=True):
    """What is plotted of one `stats` message; None where it told nothing."""

    at_s: float
    fps: dict[str, float]
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    gpu_percent: float | None
    cpu_percent: float | None


class Row(Struct, frozen=True):
    """A device in the table of all; `heard_s` is when it last said something, the broker's memory aside."""

    available: str | None
    state: str | None
    health: str | None
    unwell: str | None
    model: str | None
    model_state: str | None
    backend: str | None
    running: int | None
    cameras: int | None
    fps: float | None
    p95_ms: float | None
    gpu_percent: float | None
    stats_s: float | None
    interval_s: float | None
    heard_s: float | None


class JobView(Struct, frozen=True):
    """How a command goes, by its job and its reply; `began_s` is when it was first heard of."""

    command: str
    state: JobState
    began_s: float
    phase: str | None = None
    percent: float | None = None
    code: str | None = None
    message: str | None = None
    duration_ms: float | None = None
    result: Any = None

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed")


@dataclass(frozen=True, slots=True)
class Picture:
    """The last JPEG of a camera, the moment it came, and its number: another picture has another."""

    jpeg: bytes
    at_s: float
    number: int


@dataclass(slots=True)
class Device:
    """What one agent said. From `models` on it is known only while a browser looks at the device."""

    available: str | None = None
    status: Status | None = None
    health: Health | None = None
    health_s: float | None = None
    stats: Stats | None = None
    stats_s: float | None = None
    heard_s: float | None = None
    history: deque[Sample] = field(default_factory=lambda: deque(maxlen=_MOST_SAMPLES))
    models: Models | None = None
    cameras: dict[str, CameraStatus] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    picture_troubles: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, JobView] = field(default_factory=dict)

    def forget_details(self) -> None:
        """Nobody looks at it any more."""
        self.models = None
        for known in (self.cameras, self.pictures, self.picture_troubles, self.jobs):
            known.clear()

    def running_cameras(self) -> list[str]:
        """Those that may deliver a picture."""
        if self.available != "online" or self.status is None:
            return []
        return sorted(name for name, phase in self.status.cameras.items() if phase == "running")


def row(device: Device) -> Row:
    """What the table of all devices shows of one."""
    status, health, stats = device.status, device.health, device.stats
    phases = list(status.cameras.values()) if status else None
    newest = sample(stats, 0.0) if stats else None
    return Row(
        available=device.available,
        state=status.state if status else None,
        health=health.state if health else None,
        unwell=next(_unwell(health), None) if health else None,
        model=status.model.name if status else None,
        model_state=status.model.state if status else None,
        backend=status.backend if status else None,
        running=phases.count("running") if phases is not None else None,
        cameras=len(phases) if phases is not None else None,
        fps=round(sum(newest.fps.values()), 2) if newest else None,
        p95_ms=newest.p95_ms if newest else None,
        gpu_percent=newest.gpu_percent if newest else None,
        stats_s=device.stats_s,
        interval_s=stats.interval_s if stats else None,
        heard_s=device.heard_s,
    )


def sample(stats: Stats, at_s: float) -> Sample:
    total = stats.stages_ms.get("total")
    return Sample(
        at_s=at_s,
        fps={name: camera.inferred_fps for name, camera in stats.cameras.items()},
        p50_ms=total.p50 if total else None,
        p95_ms=total.p95 if total else None,
        p99_ms=total.p99 if total else None,
        gpu_percent=_gpu_percent(stats),
        cpu_percent=stats.host.cpu_percent if stats.host else None,
    )


def _gpu_percent(stats: Stats) -> float | None:
    """Of the busiest GPU, or of a Jetson's."""
    told = [gpu.utilisation_percent for gpu in stats.gpus or () if gpu.utilisation_percent is not None]
    return max(told) if told else stats.board.gpu_percent if stats.board else None


def _unwell(health: Health) -> Iterator[str]:
    """What is not ok, the worst first."""
    for state in ("failed", "degraded"):
        yield from (f"{name}: {check.fact}" for name, check in health.checks.items() if check.state == state)
