"""Health: what the facts come to, and how it is followed over time."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from edge_agent.config import HealthOptions
from edge_agent.health import CameraFacts, Facts, Finding, Monitor, find, worst
from edge_agent.messages import CheckState, PolicyStatus
from edge_agent.readings import BoardReadings, GpuReadings, HostReadings, Readings

OPTIONS = HealthOptions()
STATES: tuple[CheckState, ...] = ("ok", "degraded", "failed")


def facts(**changes: Any) -> Facts:
    sound = {
        "broker_connected": True,
        "broker_error": None,
        "model_state": "ready",
        "model_reason": None,
        "backend": "onnx",
        "cameras": {"a": CameraFacts("running", result_age_s=0.1)},
        "readings": Readings(host=HostReadings(memory_total_mb=8000, memory_available_mb=4000, disk_free_mb=9000)),
    }
    return Facts(**{**sound, **changes})


def host(**values: Any) -> dict[str, Any]:
    return {"readings": Readings(host=HostReadings(**values))}


def gpu(**values: Any) -> Readings:
    return Readings(gpus=[GpuReadings(index=0, name="H100", **values)])


@pytest.mark.parametrize(
    ("changes", "name", "state", "fact"),
    [
        ({}, "broker", "ok", "connected"),
        ({"broker_connected": False, "broker_error": "refused"}, "broker", "failed", "refused"),
        ({"broker_connected": False}, "broker", "failed", "not connected yet"),
        ({"broker_refusal": "edge/rig/stats"}, "broker", "degraded", "the broker refuses edge/rig/stats"),
        ({"model_state": "loading", "backend": None}, "model", "degraded", "loading"),
        ({"model_state": "failed", "model_reason": "no file"}, "model", "failed", "no file"),
        ({"engine_trouble": "no driver"}, "engine", "degraded", "no driver"),
        ({"engine_silent_s": 17.0}, "engine", "failed", "it does not come back from a batch"),
        (
            {"loader_silent_s": 700.0, "model_reason": "x: load, 0 s"},
            "model",
            "failed",
            "x: load, 0 s: it does not come back",
        ),
        ({"spool_trouble": "disk full"}, "spool", "degraded", "disk full"),
        ({"spool_busy_s": 11.0}, "spool", "failed", "a write does not come back; messages wait in memory"),
        ({"chores_busy_s": 11.0}, "disk", "failed", "reading or writing a file has not come back for 11 s"),
        ({"cameras": {"a": CameraFacts("backoff", "timeout")}}, "camera.a", "failed", "timeout"),
        (
            {"cameras": {"a": CameraFacts("backoff", "stalled", stuck_s=40)}},
            "camera.a",
            "failed",
            "stalled; a read has not come back for 40 s",
        ),
        ({"cameras": {"a": CameraFacts("running")}}, "camera.a", "degraded", "no result yet"),
        (
            {"cameras": {"a": CameraFacts("running", result_age_s=9)}},
            "camera.a",
            "degraded",
            "pictures come, but no results",
        ),
        ({"cameras": {"a": CameraFacts("disabled", "end_of_stream")}}, "camera.a", "ok", "end_of_stream"),
        ({"cameras": {"a": CameraFacts("running", result_age_s=9, period_s=10)}}, "camera.a", "ok", "results come"),
        ({"readings": None}, "memory", "ok", "not read yet"),
        ({"readings": None, "readings_age_s": 100.0}, "memory", "degraded", "the sensors do not answer"),
        ({"readings_age_s": 100.0}, "memory", "degraded", "the sensors do not answer"),
        (host(memory_total_mb=8000, memory_available_mb=399), "memory", "degraded", "399 of 8000 MB available"),
        (host(memory_total_mb=8000, memory_available_mb=79), "memory", "failed", "79 of 8000 MB available"),
        (host(), "memory", "ok", "not known here"),
        (
            host(memory_total_mb=8000, memory_available_mb=4000, memory_limit_mb=1000, memory_limit_used_mb=970),
            "memory",
            "degraded",
            "30 of 1000 MB that the service may use available",
        ),
        (host(disk_free_mb=499), "disk", "degraded", "499 MB free"),
        (host(disk_free_mb=99), "disk", "failed", "99 MB free"),
        (host(clock_synchronised=True), "clock", "ok", "synchronised"),
        (
            host(clock_synchronised=False),
            "clock",
            "degraded",
            "not synchronised: times in messages may be wrong",
        ),
        ({"readings": gpu(temperature_c=60.0)}, "thermal", "ok", "H100 60 °C"),
        ({"readings": gpu(temperature_c=91.0)}, "thermal", "degraded", "H100 91 °C"),
        ({"readings": gpu(temperature_c=101.0)}, "thermal", "failed", "H100 101 °C"),
        (
            {"readings": Readings(board=BoardReadings(temperatures_c={"cpu": 50.0, "tj": 93.0}))},
            "thermal",
            "degraded",
            "tj 93 °C",
        ),
        (
            {"readings": gpu(temperature_c=70.0, throttle_reasons=["sw_power_cap", "hw_thermal_slowdown"])},
            "thermal",
            "degraded",
            "H100 70 °C; heat holds the clocks back: hw_thermal_slowdown",
        ),
        (
            {"readings": gpu(temperature_c=110.0, throttle_reasons=["hw_thermal_slowdown"])},
            "thermal",
            "failed",
            "H100 110 °C; heat holds the clocks back: hw_thermal_slowdown",
        ),
        (
            {"readings": Readings(board=BoardReadings(throttling=["gpu-throttle-alert 1"]))},
            "thermal",
            "degraded",
            "heat holds the clocks back: gpu-throttle-alert 1",
        ),
        ({"readings": Readings()}, "thermal", "ok", "no temperature is known here"),
        ({"readings": gpu(last_xid=79)}, "gpu", "degraded", "H100: the driver reported XID 79"),
        ({"readings": gpu(last_xid=79, last_xid_age_s=3700.0)}, "gpu", "ok", "H100"),
        ({"readings": gpu(last_xid=31)}, "gpu", "ok", "H100"),
        (
            {"readings": gpu(ecc_uncorrected=2)},
            "gpu",
            "degraded",
            "H100: 2 memory errors that could not be corrected",
        ),
        ({"readings": gpu()}, "gpu", "ok", "H100"),
        ({"readings": Readings(troubles={"nvml": "GPU is lost"}), "had_gpu": True}, "gpu", "degraded", "GPU is lost"),
        ({"readings": Readings(troubles={"nvml": "NVML sees no GPU"})}, "gpu", "ok", "NVML sees no GPU"),
        ({"readings": Readings(troubles={"nvml": "GPU is lost"}), "uses_gpu": True}, "gpu", "failed", "GPU is lost"),
    ],
)
def test_a_check_is_what_its_fact_comes_to(changes: dict[str, Any], name: str, state: str, fact: str) -> None:
    found = find(facts(**changes), OPTIONS)
    assert (found[name].state, found[name].fact) == (state, fact)


def test_every_check_is_there_and_all_are_well_where_all_is() -> None:
    found = find(facts(), OPTIONS)
    expected = {"broker", "camera.a", "model", "engine", "gpu", "thermal", "memory", "disk", "spool", "clock", "policy"}
    assert set(found) == expected
    assert {finding.state for finding in found.values()} == {"ok"}


def test_facts_have_an_age() -> None:
    found = find(facts(readings_age_s=4.0, cameras={"a": CameraFacts("running", result_age_s=1.5)}), OPTIONS)
    assert (found["disk"].age_s, found["camera.a"].age_s) == (4.0, 1.5)


@given(
    broker=st.booleans(),
    model=st.sampled_from(("none", "loading", "ready", "failed")),
    silent=st.none() | st.just(20.0),
    phases=st.lists(st.sampled_from(("connecting", "running", "stalled", "backoff")), min_size=1, max_size=3),
    reason=st.sampled_from(("timeout", "stalled")),
    age=st.none() | st.floats(0, 100),
)
def test_all_is_never_well_while_the_broker_the_engine_or_a_camera_fails(
    broker: bool, model: Any, silent: float | None, phases: list[Any], reason: str, age: float | None
) -> None:
    cameras = {
        str(i): CameraFacts(phase, None if phase in ("running", "connecting") else reason, age)
        for i, phase in enumerate(phases)
    }
    now = facts(broker_connected=broker, model_state=model, engine_silent_s=silent, cameras=cameras)
    state, _ = Monitor().follow(find(now, OPTIONS), recovery_s=5)
    fails = not broker or model == "failed" or silent or any(phase != "running" for phase in phases)
    is_late = age is None or age > OPTIONS.max_result_age_s
    assert (state != "ok") or not (fails or is_late)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([{"disk_free_mb": 499}, {"disk_free_mb": 510}, {"disk_free_mb": 551}], "disk"),
        (
            [
                {"memory_total_mb": 1000, "memory_available_mb": 49},
                {"memory_total_mb": 1000, "memory_available_mb": 52},
                {"memory_total_mb": 1000, "memory_available_mb": 56},
            ],
            "memory",
        ),
    ],
)
def test_what_was_short_must_become_ample(values: list[dict[str, Any]], name: str) -> None:
    before: dict[str, CheckState] = {}
    seen = []
    for value in values:
        before[name] = find(facts(**host(**value)), OPTIONS, before)[name].state
        seen.append(before[name])
    assert seen == ["degraded", "degraded", "ok"]


def test_heat_must_fall_below_its_limit() -> None:
    def now(celsius: float, before: CheckState) -> CheckState:
        return find(facts(readings=gpu(temperature_c=celsius)), OPTIONS, {"thermal": before})["thermal"].state

    assert [now(89, "ok"), now(90, "ok"), now(88, "degraded"), now(86.9, "degraded")] == [
        "ok",
        "degraded",
        "degraded",
        "ok",
    ]
    assert [now(98, "failed"), now(96.9, "failed")] == ["failed", "degraded"]


def test_the_policys_rung_is_told() -> None:
    policy = PolicyStatus("stepped_down", 1, ["demo-320", "demo-160"], 50.0, 70.0, 1, "p95 70 ms")
    found = find(facts(policy=policy), OPTIONS)["policy"]
    assert found == Finding("degraded", "stepped_down, on rung 1 of 1: demo-160; p95 70 ms")


# Over time


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int(self.now * 1e9)


def test_worse_counts_at_once_and_better_once_it_has_lasted() -> None:
    clock = Clock()
    monitor = Monitor(clock=clock, wall_ns=clock.wall_ns)

    def at(now: float, state: CheckState) -> str:
        clock.now = 1000.0 + now
        overall, checks = monitor.follow({"disk": Finding(state, state)}, recovery_s=5)
        assert checks["disk"].state == overall
        return overall

    assert at(0, "degraded") == "degraded"
    assert at(1, "ok") == "ok"  # it had not been well before
    assert at(2, "failed") == "failed"
    assert at(3, "ok") == "failed"
    assert at(7.9, "degraded") == "failed"
    assert at(8, "ok") == "degraded"  # as bad as it was meanwhile
    assert at(9, "ok") == "degraded"
    assert at(14, "ok") == "ok"


def test_what_is_not_yet_believed_is_told_with_what_was_before() -> None:
    clock = Clock()
    monitor = Monitor(clock=clock, wall_ns=clock.wall_ns)
    for finding in (Finding("ok", "connected"), Finding("failed", "refused")):
        monitor.follow({"broker": finding}, recovery_s=5)
    clock.now += 1
    _, checks = monitor.follow({"broker": Finding("ok", "connected")}, recovery_s=5)
    assert checks["broker"].fact == "connected; a moment ago: refused"
    assert checks["broker"].since == "1970-01-01T00:16:40.000000Z"


@given(
    steps=st.lists(st.tuples(st.floats(0, 20), st.sampled_from(STATES)), max_size=60),
    recovery_s=st.just(0.0) | st.floats(0.01, 15),
)
def test_a_monitor_is_never_better_than_what_it_is_told_and_never_worse_for_long(
    steps: list[tuple[float, CheckState]], recovery_s: float
) -> None:
    clock = Clock()
    monitor = Monitor(clock=clock, wall_ns=clock.wall_ns)
    history: list[tuple[float, CheckState]] = []
    before: CheckState = "failed"
    for elapsed, state in steps:
        clock.now += elapsed
        was_well = "ok" in [one for _, one in history]
        history.append((clock.now, state))
        told, _ = monitor.follow({"x": Finding(state, "")}, recovery_s=recovery_s)
        assert worst([told, state]) == told, "never better than what it is told"
        if was_well and worst([told, before]) != told:
            recent = [one for at, one in history if clock.now - at < recovery_s]
            assert worst([told, *recent]) == told, "better only for as long as that takes"
        before = told
    for _ in range(8):  # from failed to degraded, and from that to well
        clock.now += recovery_s / 2
        told, _ = monitor.follow({"x": Finding("ok", "")}, recovery_s=recovery_s)
    assert told == "ok", "never worse for much longer"


def test_a_check_that_is_gone_is_forgotten() -> None:
    monitor = Monitor()
    monitor.follow({"camera.a": Finding("failed", "timeout")}, recovery_s=5)
    overall, checks = monitor.follow({}, recovery_s=5)
    assert (overall, checks) == ("ok", {})
