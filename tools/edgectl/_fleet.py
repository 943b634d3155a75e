"""What the topics of one agent, or of many, have said lately."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from edge_agent.messages import CameraStatus, Check, Health, Job, ResultMessage, Stats, Status

LEAVES = ("available", "status", "health", "stats", "cameras/+/status", "cameras/+/results", "jobs/+")
"""Of the topics below a device those that are read here."""

_WINDOW_S = 10.0
_SECONDS = 40
_MOST_JOBS = 8
_ENDED_S = 30.0  # for so long a job is shown that has ended
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds of the `n` results of the last ten seconds, by nearest rank."""

    p50: float
    p95: float
    p99: float
    max: float
    n: int


@dataclass(slots=True)
class CameraView:
    """What one camera's topics said lately; `rates` and `p95s_ms` are of each second that is over, `told` is the state
    that was news last: attempts to connect again are none."""

    status: CameraStatus | None = None
    last: ResultMessage | None = None
    told: tuple[str, str | None] | None = None
    results: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_SECONDS))
    p95s_ms: deque[float | None] = field(default_factory=lambda: deque(maxlen=_SECONDS))
    _arrivals: deque[tuple[float, float]] = field(default_factory=deque)
    _second: int | None = None
    _totals: list[float] = field(default_factory=list)

    def arrived(self, result: ResultMessage, now: float) -> None:
        self.roll(now)
        self.last = result
        self.results += 1
        if self._second is not None and now >= self._second:
            self._totals.append(result.latency_ms.total)
        self._arrivals.append((now, result.latency_ms.total))

    def roll(self, now: float) -> None:
        """Close the seconds that are over."""
        while self._arrivals and self._arrivals[0][0] < now - _WINDOW_S:
            self._arrivals.popleft()
        if self._second is None:
            self._second = math.floor(now) + 1  # the present one is not seen whole
        for _ in range(min(math.floor(now) - self._second, _SECONDS)):
            self.rates.append(float(len(self._totals)))
            self.p95s_ms.append(rank(sorted(self._totals), 0.95) if self._totals else None)
            self._totals.clear()
        self._second = max(self._second, math.floor(now))

    def fps(self, now: float) -> float | None:
        """Results a second of the last ten; None if there never was one."""
        if not self.results:
            return None
        recent = [at for at, _ in self._arrivals if at >= now - _WINDOW_S]
        if len(recent) < 2:
            return 0.0 if self.results > 1 else None
        is_late = now - recent[-1] > 2 * (recent[-1] - recent[0]) / (len(recent) - 1) + 0.5
        return (len(recent) - 1) / ((now if is_late else recent[-1]) - recent[0])

    def latency(self) -> Spread | None:
        """Of the results of the last ten seconds."""
        ordered = sorted(total for _, total in self._arrivals)
        if not ordered:
            return None
        p50, p95, p99 = (rank(ordered, share) for share in (0.5, 0.95, 0.99))
        return Spread(p50, p95, p99, max=ordered[-1], n=len(ordered))


@dataclass(slots=True)
class DeviceView:
    """What one agent's topics said lately; `health_at` and `jobs_at` are when it came, by our clock."""

    available: str | None = None
    status: Status | None = None
    health: Health | None = None
    health_at: float = 0.0
    stats: Stats | None = None
    cameras: dict[str, CameraView] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    jobs_at: dict[str, float] = field(default_factory=dict)

    def troubles(self) -> Mapping[str, Check]:
        """The checks that are not well."""
        checks = self.health.checks if self.health else {}
        return {name: check for name, check in checks.items() if check.state != "ok"}

    def lasts_s(self, check: Check, now: float) -> float | None:
        """For how long a check has been in its state: by the agent's clock, and by ours since it said so."""
        if self.health is None:
            return None
        try:
            at, since = (datetime.fromisoformat(text.replace("Z", "+00:00")) for text in (self.health.at, check.since))
        except ValueError:
            return None
        return (at - since).total_seconds() + now - self.health_at

    def age_s(self, check: Check, now: float) -> float:
        """How old the fact behind a check is at least."""
        return check.age_s + now - self.health_at


class FleetView:
    """`take` reads a message and tells what is new in it; one that it does not understand is another version's."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.devices: dict[str, DeviceView] = {}

    def take(self, topic: str, payload: bytes, now: float) -> Sequence[str]:
        """Sentences about what has changed by this."""
        name, _, rest = topic[len(self.prefix) + 1 :].partition("/")
        try:
            return list(self._take(name, rest.split("/"), payload, now))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []

    def roll(self, now: float) -> None:
        for device in self.devices.values():
            for camera in device.cameras.values():
                camera.roll(now)
            for name in [name for name, at in device.jobs_at.items() if now - at > _ENDED_S]:
                if device.jobs[name].state != "running":
                    del device.jobs[name], device.jobs_at[name]

    def snapshot(self, now: float) -> dict[str, Any]:
        """All of it, as JSON has it; null is what was not heard."""
        return {name: _device(view, now) for name, view in sorted(self.devices.items())}

    def _take(self, name: str, leaf: Sequence[str], payload: bytes, now: float) -> Iterator[str]:
        view = self.devices.setdefault(name, DeviceView())
        match leaf:
            case ["available"]:
                before, view.available = view.available, payload.decode()
                if before != view.available:
                    yield f"{name}: {view.available}"
            case ["status"]:
                yield from _status_news(name, view, msgspec.json.decode(payload, type=Status))
            case ["health"]:
                yield from _health_news(name, view, msgspec.json.decode(payload, type=Health))
                view.health_at = now
            case ["stats"]:
                view.stats = msgspec.json.decode(payload, type=Stats)
            case ["cameras", camera, "status"]:
                yield from _camera_news(name, view, msgspec.json.decode(payload, type=CameraStatus), camera)
            case ["cameras", camera, "results"]:
                result = msgspec.json.decode(payload, type=ResultMessage)
                view.cameras.setdefault(camera, CameraView()).arrived(result, now)
            case ["jobs", _]:
                yield from _job_news(name, view, msgspec.json.decode(payload, type=Job), now)


def rank(ordered: Sequence[float], share: float) -> float:
    """The value at or below which this share of them lies (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def sparkline(values: Sequence[float | None]) -> str:
    """A bar a value, from 0 to the largest; a blank where there is none."""
    top = max((value for value in values if value is not None), default=0.0)
    if top <= 0:
        return "".join(" " if value is None else _BARS[0] for value in values)
    steps = len(_BARS) - 1
    return "".join(" " if value is None else _BARS[round(steps * max(0.0, value) / top)] for value in values)


def model_of(status: Status) -> str:
    """What runs, and what is on its way."""
    model = status.model
    told = f"{model.name or 'no model'} ({model.state})"
    if model.next:
        told += f", {model.next} is loading"
    return f"{told} on {status.backend or 'no backend'}"


def _status_news(name: str, view: DeviceView, now: Status) -> Iterator[str]:
    before, view.status = view.status, now
    if before is None or before.state != now.state:
        yield f"{name}: {now.state}, version {now.version}"
    if before is None or model_of(before) != model_of(now):
        yield f"{name}: {model_of(now)}"
    if before is None or set(before.cameras) != set(now.cameras):
        for gone in set(view.cameras) - set(now.cameras):
            del view.cameras[gone]


def _health_news(name: str, view: DeviceView, now: Health) -> Iterator[str]:
    before, view.health = view.health, now
    if before is None:
        yield f"{name}: health {now.state}"
    old = before.checks if before else {}
    for check, found in now.checks.items():
        was = old[check].state if check in old else "ok"
        if found.state != was:
            yield f"{name}: {check} {found.state}: {found.fact}"


def _camera_news(name: str, view: DeviceView, now: CameraStatus, camera: str) -> Iterator[str]:
    seen = view.cameras.setdefault(camera, CameraView())
    seen.status = now
    is_retry = seen.told is not None and seen.told[0] in ("backoff", "stalled") and now.state == "connecting"
    if not is_retry and seen.told != (now.state, now.reason):
        seen.told = now.state, now.reason
        why = f" ({now.reason}): {now.message}" if now.reason else ""
        yield f"{name}/{camera}: {now.state}{why}"


def _job_news(name: str, view: DeviceView, job: Job, now: float) -> Iterator[str]:
    view.jobs.pop(job.id, None)
    view.jobs[job.id], view.jobs_at[job.id] = job, now
    for old in list(view.jobs)[:-_MOST_JOBS]:
        del view.jobs[old], view.jobs_at[old]
    percent = f" {job.percent:.0f} %" if job.percent is not None else ""
    why = f": {job.message}" if job.message else ""
    yield f"{name}: {job.command} {job.phase if job.state == 'running' else job.state}{percent}{why}"


def _device(view: DeviceView, now: float) -> dict[str, Any]:
    return {
        "available": view.available,
        "status": msgspec.to_builtins(view.status),
        "health": msgspec.to_builtins(view.health),
        "stats": msgspec.to_builtins(view.stats),
        "cameras": {name: _camera(camera, now) for name, camera in sorted(view.cameras.items())},
        "jobs": {name: msgspec.to_builtins(job) for name, job in view.jobs.items()},
    }


def _camera(view: CameraView, now: float) -> dict[str, Any]:
    fps = view.fps(now)
    return {
        "status": msgspec.to_builtins(view.status),
        "results": view.results,
        "results_per_s": None if fps is None else round(fps, 2),
        "latency_ms": msgspec.to_builtins(view.latency()),
        "last": msgspec.to_builtins(view.last),
    }
