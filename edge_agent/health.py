"""Named checks of what runs, each with the fact behind it and that fact's age, and the state that they come to.

`find` judges the facts of one moment; `Monitor` follows the checks over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from edge_agent.config import HealthOptions
from edge_agent.messages import CameraPhase, Check, CheckState, ModelState, PolicyStatus, timestamp
from edge_agent.readings import Readings

log = structlog.get_logger()

_SEVERITY: Sequence[CheckState] = ("ok", "degraded", "failed")
_FAILED_FACTOR = 0.2  # of the share or size that is wanted: less than that is no longer enough to go on with
_HOTTER_C = 10.0
_COOLER_C = 3.0
_STUCK_S = 10.0
_PERIODS = 3
_XID_LASTS_S = 3600.0
_XIDS_OF_PROGRAMS = (13, 31, 43, 45)
"""What a program did, perhaps another one: https://docs.nvidia.com/deploy/xid-errors/"""
_MARGIN = 1.1  # of what is wanted, before a lack of it is over


@dataclass(frozen=True, slots=True)
class CameraFacts:
    """What health asks of a camera; `result_age_s` is None before its first result, `stuck_s` for how long a read has
    not come back from its driver, `period_s` the time between two of its pictures, where that is known."""

    phase: CameraPhase
    reason: str | None = None
    result_age_s: float | None = None
    stuck_s: float = 0.0
    period_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What health is computed from, at one moment. `engine_trouble` is why the wanted backend does not run;
    `engine_silent_s` and `loader_silent_s`: for how long they have been at one step, None where that is no concern;
    `spool_busy_s` and `chores_busy_s`: for how long a thread that reads and writes files has been at one of them;
    `readings` are as old as `readings_age_s`, and None before the first; `had_gpu`: whether one was ever seen."""

    broker_connected: bool
    broker_error: str | None
    model_state: ModelState
    model_reason: str | None
    backend: str | None = None
    engine_trouble: str | None = None
    engine_silent_s: float | None = None
    loader_silent_s: float | None = None
    spool_busy_s: float = 0.0
    chores_busy_s: float = 0.0
    policy: PolicyStatus | None = None
    broker_refusal: str | None = None
    spool_trouble: str | None = None
    cameras: Mapping[str, CameraFacts] = field(default_factory=dict)
    readings: Readings | None = None
    readings_age_s: float = 0.0
    uses_gpu: bool = False
    had_gpu: bool = False
    sensed_every_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check comes to now, the fact behind it, and the seconds since that was seen."""

    state: CheckState
    fact: str
    age_s: float = 0.0


Before = Mapping[str, CheckState]
"""What the checks said before: what is short must become ample, not just enough, before it is well again."""


def find(facts: Facts, options: HealthOptions, before: Before | None = None) -> dict[str, Finding]:
    """All checks of these facts."""
    known = before or {}
    found = {
        "broker": _broker(facts),
        "model": _model(facts),
        "engine": _engine(facts),
        "policy": _policy(facts),
        "spool": _spool(facts),
    }
    for name, check in _MACHINE.items():
        found[name] = _of_machine(facts, options, known.get(name, "ok"), check)
    cameras = {f"camera.{name}": _camera(camera, options) for name, camera in facts.cameras.items()}
    return found | cameras


def worst(states: Sequence[CheckState]) -> CheckState:
    """`failed` before `degraded` before `ok`; `ok` of nothing."""
    return max(states, key=_SEVERITY.index, default="ok")


class Monitor:
    """The checks over time: worse counts at once, better once it has lasted, so that what flaps stays unwell. The
    first time that a check is well counts at once."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._clock = clock
        self._wall_ns = wall_ns
        self._followed: dict[str, _Followed] = {}

    @property
    def states(self) -> Before:
        return {name: followed.state for name, followed in self._followed.items()}

    def follow(self, found: Mapping[str, Finding], *, recovery_s: float) -> tuple[CheckState, dict[str, Check]]:
        """The worst state, and each check as it is to be told. Changes are logged, once each."""
        self._followed = {name: followed for name, followed in self._followed.items() if name in found}
        checks = {name: self._follow(name, finding, recovery_s) for name, finding in found.items()}
        return worst([check.state for check in checks.values()]), checks

    def _follow(self, name: str, finding: Finding, recovery_s: float) -> Check:
        followed = self._followed.get(name)
        if followed is None:
            followed = _Followed(finding.state, self._wall_ns(), was_well=finding.state == "ok")
            self._followed[name] = followed
            if finding.state == "failed":
                _log(name, followed.state, finding.fact)
        elif followed.moves(finding, self._clock(), recovery_s):
            followed.since_ns = self._wall_ns()
            _log(name, followed.state, finding.fact)
        fact = finding.fact
        if followed.state == finding.state:
            followed.fact = finding.fact
        else:
            fact = f"{finding.fact}; a moment ago: {followed.fact}"
        return Check(followed.state, fact, timestamp(followed.since_ns), round(max(0.0, finding.age_s), 1))


@dataclass(slots=True)
class _Followed:
    """A check as it was told last; what it has been better than that for, and since when."""

    state: CheckState
    since_ns: int
    fact: str = ""
    was_well: bool = False
    better: CheckState | None = None
    better_since: float = 0.0

    def moves(self, finding: Finding, now: float, recovery_s: float) -> bool:
        """Take a finding in; whether the state is another one now."""
        before = self.state
        if _SEVERITY.index(finding.state) >= _SEVERITY.index(self.state):
            self.state, self.better = finding.state, None
        else:
            if self.better is None:
                self.better, self.better_since = finding.state, now
            self.better = worst([self.better, finding.state])
            if now - self.better_since >= recovery_s or not self.was_well:
                self.state, self.better = self.better, None
        self.was_well = self.was_well or self.state == "ok"
        return self.state != before


def _log(name: str, state: CheckState, fact: str) -> None:
    tell = {"ok": log.info, "degraded": log.warning, "failed": log.error}[state]
    tell("health.changed", check=name, state=state, fact=fact)


def _broker(facts: Facts) -> Finding:
    if facts.broker_connected and facts.broker_refusal:
        return Finding("degraded", f"the broker refuses {facts.broker_refusal}")
    if facts.broker_connected:
        return Finding("ok", "connected")
    return Finding("failed", facts.broker_error or "not connected yet")


def _spool(facts: Facts) -> Finding:
    if facts.spool_busy_s > _STUCK_S:
        return Finding("failed", "a write does not come back; messages wait in memory", facts.spool_busy_s)
    return Finding("degraded", facts.spool_trouble) if facts.spool_trouble else Finding("ok", "keeps")


def _model(facts: Facts) -> Finding:
    if facts.loader_silent_s is not None:
        return Finding("failed", f"{facts.model_reason or 'loading'}: it does not come back", facts.loader_silent_s)
    fact = facts.model_reason or facts.model_state
    if facts.model_state == "failed":
        return Finding("failed", fact)
    runs = facts.backend is not None  # while another one is on its way
    return Finding("ok" if runs or facts.model_state == "ready" else "degraded", fact)


def _engine(facts: Facts) -> Finding:
    if facts.engine_silent_s is not None:
        return Finding("failed", "it does not come back from a batch", facts.engine_silent_s)
    if facts.engine_trouble:
        return Finding("degraded", facts.engine_trouble)
    return Finding("ok", facts.backend or "no model yet")


def _policy(facts: Facts) -> Finding:
    policy = facts.policy
    if policy is None or policy.state in ("off", "ok"):
        return Finding("ok", policy.state if policy else "off")
    told = f"{policy.state}, on rung {policy.rung} of {len(policy.models) - 1}: {policy.models[policy.rung]}"
    return Finding("degraded", f"{told}; {policy.detail}")


def _camera(camera: CameraFacts, options: HealthOptions) -> Finding:
    if camera.phase == "disabled":
        return Finding("ok", camera.reason or "disabled")
    if camera.phase != "running":
        stuck = f"; a read has not come back for {camera.stuck_s:.0f} s" if camera.stuck_s else ""
        return Finding("failed" if camera.reason else "degraded", (camera.reason or camera.phase) + stuck)
    if camera.result_age_s is None:
        return Finding("degraded", "no result yet")
    if camera.result_age_s > max(options.max_result_age_s, _PERIODS * camera.period_s):
        return Finding("degraded", "pictures come, but no results", camera.result_age_s)
    return Finding("ok", "results come", camera.result_age_s)


# What the sensors see


def _of_machine(facts: Facts, options: HealthOptions, before: CheckState, check: _MachineCheck) -> Finding:
    if facts.readings_age_s > 3 * facts.sensed_every_s + 10:
        return Finding("degraded", "the sensors do not answer", facts.readings_age_s)
    if facts.readings is None:
        return Finding("ok", "not read yet")
    state, fact = check(facts, facts.readings, options, before)
    return Finding(state, fact, facts.readings_age_s)


def _gpu(facts: Facts, readings: Readings, options: HealthOptions, before: CheckState) -> tuple[CheckState, str]:
    if trouble := readings.troubles.get("nvml"):
        unused: CheckState = "degraded" if facts.had_gpu else "ok"
        return "failed" if facts.uses_gpu else unused, trouble
    told = []
    for gpu in readings.gpus or ():
        name = gpu.name or f"GPU {gpu.index}"
        is_recent = (gpu.last_xid_age_s or 0.0) < _XID_LASTS_S
        if gpu.last_xid is not None and gpu.last_xid not in _XIDS_OF_PROGRAMS and is_recent:
            told.append(f"{name}: the driver reported XID {gpu.last_xid}")
        if gpu.ecc_uncorrected:
            told.append(f"{name}: {gpu.ecc_uncorrected} memory errors that could not be corrected")
    if told:
        return "degraded", "; ".join(told)
    names = [gpu.name or f"GPU {gpu.index}" for gpu in readings.gpus or ()]
    return "ok", ", ".join(names) or ("its driver tells nothing of it" if facts.uses_gpu else "none is used")


def _thermal(facts: Facts, readings: Readings, options: HealthOptions, before: CheckState) -> tuple[CheckState, str]:
    hot = [(gpu.temperature_c, gpu.name or f"GPU {gpu.index}") for gpu in readings.gpus or ()]
    if readings.board is not None:
        hot += [(value, zone) for zone, value in (readings.board.temperatures_c or {}).items()]
    known = [(value, name) for value, name in hot if value is not None]
    slowed = [reason for gpu in readings.gpus or () for reason in gpu.throttle_reasons or () if "thermal" in reason]
    if readings.board is not None:
        slowed += readings.board.throttling or []
    held = f"heat holds the clocks back: {', '.join(sorted(set(slowed)))}" if slowed else ""
    if not known:
        return ("degraded", held) if held else ("ok", "no temperature is known here")
    most, name = max(known)
    limit = options.max_temperature_c
    state: CheckState = "ok"
    if most >= limit + _HOTTER_C - (_COOLER_C if before == "failed" else 0.0):
        state = "failed"
    elif most >= limit - (_COOLER_C if before != "ok" else 0.0):
        state = "degraded"
    if held:
        return worst([state, "degraded"]), f"{name} {most:.0f} °C; {held}"
    return state, f"{name} {most:.0f} °C"


def _memory(facts: Facts, readings: Readings, options: HealthOptions, before: CheckState) -> tuple[CheckState, str]:
    host = readings.host
    if host is None or host.memory_available_mb is None or not host.memory_total_mb:
        return "ok", "not known here"
    available, total, whose = host.memory_available_mb, host.memory_total_mb, ""
    if host.memory_limit_mb is not None and host.memory_limit_used_mb is not None:
        left = host.memory_limit_mb - host.memory_limit_used_mb
        if left < available:
            available, total, whose = max(0.0, left), host.memory_limit_mb, " that the service may use"
    fact = f"{available:.0f} of {total:.0f} MB{whose} available"
    return _enough(available / total, options.min_memory_share, before), fact


def _disk(facts: Facts, readings: Readings, options: HealthOptions, before: CheckState) -> tuple[CheckState, str]:
    host = readings.host
    if facts.chores_busy_s > _STUCK_S:
        return "failed", f"reading or writing a file has not come back for {facts.chores_busy_s:.0f} s"
    if host is None or host.disk_free_mb is None:
        return "ok", "not known here"
    return _enough(host.disk_free_mb, options.min_disk_mb, before), f"{host.disk_free_mb:.0f} MB free"


def _clock(facts: Facts, readings: Readings, options: HealthOptions, before: CheckState) -> tuple[CheckState, str]:
    synchronised = readings.host.clock_synchronised if readings.host else None
    if synchronised is None:
        return "ok", "not known here"
    return ("ok", "synchronised") if synchronised else ("degraded", "not synchronised: times in messages may be wrong")


def _enough(there: float, wanted: float, before: CheckState) -> CheckState:
    """Whether there is as much as is wanted; once there was not, a little more."""
    if there < _FAILED_FACTOR * wanted * (_MARGIN if before == "failed" else 1.0):
        return "failed"
    return "degraded" if there < wanted * (_MARGIN if before != "ok" else 1.0) else "ok"


_MachineCheck = Callable[[Facts, Readings, HealthOptions, CheckState], tuple[CheckState, str]]
_MACHINE: Mapping[str, _MachineCheck] = {
    "gpu": _gpu,
    "thermal": _thermal,
    "memory": _memory,
    "disk": _disk,
    "clock": _clock,
}
