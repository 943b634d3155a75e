"""Named checks of what runs, each with the fact behind it, and the state that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.messages import CameraPhase, Check, CheckState, ModelState, PolicyStatus


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
