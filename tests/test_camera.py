"""What becomes of a camera that goes, hangs, stalls, freezes or breaks: by a clock of the tests' own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.backoff import backoff
from edge_agent.camera import MAX_ABANDONED
from edge_agent.frames import FramePool
from edge_agent.queue import QueueLimits
from edge_agent.session import StillPicture, Thinner
from tests.simulation import FakeCamera, Simulation

BACKOFF_S = 4.0
OPTIONS = {"backoff_max_s": BACKOFF_S, "stall_timeout_s": 2.0, "frozen_timeout_s": 5.0}


def simulate(until_s: float, *, options: dict[str, Any] | None = None, **camera: Any) -> Simulation:
    simulation = Simulation({"a": FakeCamera(**camera)}, options={**OPTIONS, **(options or {})})
    simulation.run(until_s)
    return simulation


def test_a_camera_that_works_runs() -> None:
    done = simulate(60.0)
    assert done.told["a"].phases == [("connecting", None), ("running", None)]
    assert [frame.seq for frame in done.told["a"].frames] == list(range(len(done.told["a"].frames)))
    assert len(done.told["a"].frames) >= 595
    quality = done.cameras["a"].quality
    assert quality.last_hour().fps == pytest.approx(10.0, rel=0.02)
    assert quality.last_hour().jitter_ms < 1.0
    assert quality.first_frame_ms == pytest.approx(110, abs=5)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("gone", [("backoff", "disconnected"), ("connecting", None), ("backoff", "device_not_found")]),
        ("silent", [("stalled", "stalled"), ("backoff", "stalled"), ("connecting", None)]),
        ("hung", [("stalled", "stalled"), ("backoff", "stalled"), ("connecting", None)]),
        ("frozen", [("stalled", "frozen"), ("backoff", "frozen"), ("connecting", None), ("stalled", "frozen")]),
        ("damaged", [("stalled", "error"), ("backoff", "error"), ("connecting", None)]),
        ("raises", [("backoff", "error"), ("connecting", None), ("backoff", "error")]),
        ("held", [("stalled", "stalled"), ("backoff", "stalled"), ("connecting", None)]),
    ],
)
def test_each_fault_has_its_states_and_ends_within_backoff_and_2_s(
    fault: Any, expected: list[tuple[str, str | None]]
) -> None:
    healed_s = 40.0
    done = simulate(100.0, faults=[(10.0, healed_s, fault)])
    told = done.told["a"]
    assert told.phases[:2] == [("connecting", None), ("running", None)]
    assert told.phases[2 : 2 + len(expected)] == expected
    assert told.phases[-1] == ("running", None)
    again = next(frame for frame in told.frames if (frame.captured_mono_ns / 1e9) % 86_400 > healed_s)
    assert (again.captured_mono_ns / 1e9) % 86_400 - healed_s < BACKOFF_S + 2.0
    assert done.fakes["a"].open_now == 1, "every connection but the last was closed"
    assert done.cameras["a"].hung == 0


def test_a_short_silence_is_a_stall_and_no_reconnection() -> None:
    done = simulate(30.0, faults=[(10.0, 13.0, "silent")])
    assert done.told["a"].phases == [
        ("connecting", None),
        ("running", None),
        ("stalled", "stalled"),
        ("running", None),
    ]
    assert done.fakes["a"].connections == 1
    assert (done.cameras["a"].quality.stalls, done.cameras["a"].quality.reconnects) == (1, 0)


def test_a_burst_of_old_pictures_after_a_stall_is_not_published() -> None:
    done = simulate(30.0, faults=[(10.0, 13.5, "held")])
    frames = done.told["a"].frames
    times = [frame.captured_mono_ns / 1e9 % 86_400 for frame in frames]
    held = [time for time in times if 10.05 < time < 12.4]
    assert held == [], "older than a second when they came"
    assert done.frames.drops("a")["stale"] >= 20
    assert times == sorted(times)
    assert done.told["a"].phases[-1] == ("running", None)


def test_threads_that_never_come_back_are_bounded_and_counted() -> None:
    done = simulate(600.0, faults=[(10.0, 1e6, "hung")])
    camera = done.cameras["a"]
    assert camera.hung == MAX_ABANDONED
    assert done.fakes["a"].connections == 1, "the others hang in open"
    assert camera.quality.abandoned == MAX_ABANDONED
    assert camera.state.phase == "backoff"
    assert "isolation" in (camera.state.message or "")


def test_a_frozen_camera_stays_frozen_through_reconnection_until_the_picture_changes() -> None:
    done = simulate(120.0, faults=[(10.0, 60.0, "frozen")])
    frozen = [frame for frame in done.told["a"].frames if 16.0 < frame.captured_mono_ns / 1e9 % 86_400 < 60.0]
    assert frozen == [], "nothing is published of a picture that stands still"
    assert done.frames.drops("a")["frozen"] > 0
    assert done.told["a"].phases[-1] == ("running", None)


def test_pictures_that_are_passed_over_do_not_hide_that_the_others_are_frozen() -> None:
    done = simulate(60.0, faults=[(10.0, 40.0, "frozen")], options={"fps": 2.0})
    told = done.told["a"]
    assert told.phases[:4] == [
        ("connecting", None),
        ("running", None),
        ("stalled", "frozen"),
        ("backoff", "frozen"),
    ]
    assert ("running", None) not in told.phases[2:-1]
    assert told.phases[-1] == ("running", None)
    assert len(told.frames) == pytest.approx(2 * 35, abs=8), "the frozen ones are not among them"
    assert done.cameras["a"].quality.skipped > 3 * len(told.frames)


@pytest.mark.parametrize("kind", [ValueError, MemoryError, SystemExit, KeyboardInterrupt, StopIteration, OSError])
def test_whatever_a_source_raises_is_an_error_of_that_camera(kind: type[BaseException]) -> None:
    done = simulate(60.0, faults=[(10.0, 12.0, "raises")], raises=lambda: kind("what?"))
    assert ("backoff", "error") in done.told["a"].phases
    assert done.told["a"].phases[-1] == ("running", None)


def test_a_slow_camera_is_not_stalled() -> None:
    done = simulate(100.0, fps=0.2, nominal_fps=0.2)
    assert done.told["a"].phases == [("connecting", None), ("running", None)]
    assert len(done.told["a"].frames) >= 18


def test_a_camera_at_500_fps_is_bounded_and_takes_nothing_from_the_others() -> None:
    fakes = {"fast": FakeCamera(fps=500.0), "slow": FakeCamera(fps=5.0)}
    simulation = Simulation(fakes, options=OPTIONS)
    simulation.run(10.0, engine_s=0.1)  # at most 80 frames a second
    assert simulation.most_waiting <= 4
    assert len(simulation.told["slow"].frames) >= 48
    drops = simulation.frames.drops("fast")
    captured = simulation.cameras["fast"].quality.captured
    assert captured == len(simulation.told["fast"].frames) + sum(drops.values()) + simulation.frames.waiting("fast")


def test_a_device_that_comes_back_is_opened_at_once() -> None:
    simulation = Simulation({"a": FakeCamera(faults=[(5.0, 30.0, "gone")])}, options={**OPTIONS, "backoff_max_s": 30.0})
    simulation.after(30.1, simulation.cameras["a"].resume)
    simulation.run(32.0)
    told = simulation.told["a"]
    assert told.phases[-1] == ("running", None)
    assert any(frame.captured_mono_ns / 1e9 % 86_400 < 30.5 for frame in told.frames[-30:])


def test_disable_enable_and_close_act_at_once_and_let_go() -> None:
    simulation = Simulation({"a": FakeCamera()}, options=OPTIONS)
    camera = simulation.cameras["a"]
    simulation.after(5.0, camera.disable)
    simulation.after(6.0, lambda: opened.append(simulation.fakes["a"].open_now))
    simulation.after(10.0, camera.enable)
    simulation.after(15.0, camera.close)
    opened: list[int] = []
    simulation.run(20.0)
    assert simulation.told["a"].phases == [
        ("connecting", None),
        ("running", None),
        ("disabled", None),
        ("connecting", None),
        ("running", None),
        ("disabled", None),
    ]
    assert opened == [0]
    assert simulation.fakes["a"].open_now == 0
    assert camera.step() is None
    seqs = [frame.seq for frame in simulation.told["a"].frames]
    assert seqs == sorted(set(seqs)), "numbers go on"


def test_a_camera_given_other_options_connects_again_and_counts_on() -> None:
    simulation = Simulation({"a": FakeCamera()}, options=OPTIONS)
    camera = simulation.cameras["a"]
    simulation.after(5.0, lambda: camera.change(camera.options, camera._make, is_live=True))
    simulation.run(10.0)
    assert simulation.fakes["a"].connections == 2
    seqs = [frame.seq for frame in simulation.told["a"].frames]
    assert seqs == list(range(len(seqs)))
    assert camera.quality.reconnects == 0, "nothing was lost"


Faults = st.lists(
    st.tuples(
        st.floats(1.0, 14.0),
        st.floats(0.1, 6.0),
        st.sampled_from(("gone", "silent", "hung", "frozen", "held", "raises", "refuses", "damaged")),
    ),
    max_size=4,
)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None)
@given(faults=st.lists(Faults, min_size=3, max_size=3), seed=st.integers(0, 2**32 - 1))
def test_whatever_happens_to_three_cameras_the_fourth_keeps_its_rate_and_the_counts_are_honest(
    faults: list[list[tuple[float, float, Any]]], seed: int
) -> None:
    random.seed(seed)  # the back-off's jitter
    fakes = {
        f"sick{index}": FakeCamera(fps=5.0, faults=[(begin, begin + long, kind) for begin, long, kind in schedule])
        for index, schedule in enumerate(faults)
    }
    fakes["healthy"] = FakeCamera(fps=5.0)
    limits = QueueLimits(max_frames=3, max_bytes=3 * 24)
    with structlog.testing.capture_logs():
        simulation = Simulation(fakes, options=OPTIONS, limits=limits)
        simulation.run(30.0, engine_s=0.1)
    assert simulation.most_waiting <= 3
    for name, camera in simulation.cameras.items():
        told = simulation.told[name]
        out = len(told.frames) + sum(simulation.frames.drops(name).values()) + simulation.frames.waiting(name)
        assert camera.quality.captured == out
        assert camera.state.phase == "running", (name, told.phases)
        assert fakes[name].open_now == 1
        order = [(frame.seq, frame.captured_mono_ns) for frame in told.frames]
        assert order == sorted(order)
        assert len(set(order)) == len(order)
    assert len(simulation.told["healthy"].frames) >= 0.95 * 30 * 5
    assert simulation.told["healthy"].phases == [("connecting", None), ("running", None)]


def test_the_backoff_doubles_to_its_most_with_full_jitter() -> None:
    delays = backoff()
    waits = [next(backoff()) for _ in range(500)]
    assert 0 < min(waits) < 0.1 and 0.9 < max(waits) <= 1.0
    steady = [delay for _, delay in zip(range(600), delays, strict=False)][10:]
    assert max(steady) <= 30.0 and max(steady) > 28.0
    assert min(steady) < 2.0
    assert 13.0 < np.mean(steady) < 17.0


@settings(max_examples=100, deadline=None)
@given(stream=st.floats(1.0, 120.0), wanted=st.floats(0.2, 120.0), jitter=st.floats(0.0, 0.09), seed=st.integers(0, 99))
def test_a_thinned_stream_has_the_wanted_rate(stream: float, wanted: float, jitter: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(-jitter, jitter, 2000)
    times = [int((index + noise[index]) / stream * 1e9) for index in range(2000)]
    thinner = Thinner(wanted)
    passed = sum(thinner.wants(time) for time in times)
    expected = min(stream, wanted) * 2000 / stream
    assert passed <= expected * 1.02 + 2
    assert passed >= expected * 0.85 - 2  # near the stream's own rate the jitter costs some


def test_a_still_picture_is_told_from_a_moving_one() -> None:
    still = StillPicture(5.0)
    image = np.zeros((480, 640, 3), np.uint8)
    assert still.lasts_s(image, 0) == 0
    assert still.lasts_s(image, int(4.9e9)) == 0
    assert still.lasts_s(image, int(5.1e9)) == pytest.approx(5.1)
    image[::7] = 1
    assert still.lasts_s(image, int(6e9)) == 0
    for second in range(100):  # a small thing that moves is a change, wherever it is
        image[:] = 7
        image[100 + second % 50 : 110 + second % 50, 333 + second] = 255
        assert still.lasts_s(image, int((10 + second) * 1e9)) == 0
    assert StillPicture(0.0).lasts_s(image, int(1e15)) == 0


def test_buffers_that_are_given_back_are_lent_again() -> None:
    pool = FramePool(keep=lambda: 2)
    a, b = pool.take((2, 4, 3)), pool.take((2, 4, 3))
    assert a is not b
    pool.give(a)
    assert pool.take((2, 4, 3)) is a
    pool.give(b)
    assert pool.take((3, 4, 3)).shape == (3, 4, 3)
    assert pool.take((2, 4, 3)) is b
    pool.give(a[:1])  # a view is not kept, nor what it has not lent
    stranger = np.empty((5, 5, 3), np.uint8)
    pool.give(stranger)
    assert pool.take((1, 4, 3)).base is None
    assert pool.take((5, 5, 3)) is not stranger
