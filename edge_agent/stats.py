"""Counters, percentiles, and the facts that health is judged by."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.data import Names, Prediction, Result
from edge_agent.messages import CameraPhase, Check, CheckState, ModelState, Percentiles, PolicyStatus, percentiles
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


@dataclass(frozen=True, slots=True)
class CameraFacts:
    """What health asks of a camera; `result_age_s` is None before its first result."""

    phase: CameraPhase
    reason: str | None = None
    result_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What health is computed from, at one moment. `engine_trouble` is why the wanted backend does not run."""

    broker_connected: bool
    broker_error: str | None
    model_state: ModelState
    model_reason: str | None
    backend: str | None = None
    engine_trouble: str | None = None
    policy: PolicyStatus | None = None
    broker_refusal: str | None = None
    spool_trouble: str | None = None
    cameras: Mapping[str, CameraFacts] = field(default_factory=dict)


def health(facts: Facts, *, max_result_age_s: float) -> tuple[CheckState, dict[str, Check]]:
    """The worst state and the named checks with the fact behind each."""
    checks = {"broker": _broker(facts), "model": _model(facts), "engine": _engine(facts), "policy": _policy(facts)}
    checks["spool"] = Check("degraded", facts.spool_trouble) if facts.spool_trouble else Check("ok", "keeps")
    checks |= {f"camera.{name}": _camera(camera, max_result_age_s) for name, camera in facts.cameras.items()}
    return worst([check.state for check in checks.values()]), checks


def worst(states: Sequence[CheckState]) -> CheckState:
    """`failed` before `degraded` before `ok`; `ok` of nothing."""
    return max(states, key=("ok", "degraded", "failed").index, default="ok")


def _broker(facts: Facts) -> Check:
    if facts.broker_connected and facts.broker_refusal:
        return Check("degraded", f"the broker refuses {facts.broker_refusal}")
    if facts.broker_connected:
        return Check("ok", "connected")
    return Check("failed", facts.broker_error or "not connected yet")


def _model(facts: Facts) -> Check:
    fact = facts.model_reason or facts.model_state
    if facts.model_state == "failed":
        return Check("failed", fact)
    runs = facts.backend is not None  # while another one is on its way
    return Check("ok" if runs or facts.model_state == "ready" else "degraded", fact)


def _engine(facts: Facts) -> Check:
    if facts.engine_trouble:
        return Check("degraded", facts.engine_trouble)
    return Check("ok", facts.backend or "no model yet")


def _policy(facts: Facts) -> Check:
    policy = facts.policy
    if policy is None or policy.state in ("off", "ok"):
        return Check("ok", policy.state if policy else "off")
    told = f"{policy.state}, on rung {policy.rung} of {len(policy.models) - 1}: {policy.models[policy.rung]}"
    return Check("degraded", f"{told}; {policy.detail}")


def _camera(camera: CameraFacts, max_result_age_s: float) -> Check:
    if camera.phase == "disabled":
        return Check("ok", camera.reason or "disabled")
    if camera.phase != "running":
        return Check("failed" if camera.reason else "degraded", camera.reason or camera.phase)
    if camera.result_age_s is None:
        return Check("degraded", "no result yet")
    state: CheckState = "ok" if camera.result_age_s <= max_result_age_s else "degraded"
    return Check(state, f"last result {camera.result_age_s:.1f} s ago")
