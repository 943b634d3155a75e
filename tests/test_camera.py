"""One camera's thread: reconnection, buffers, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest

from edge_agent import camera as camera_module
from edge_agent.camera import Camera, CameraState
from edge_agent.config import CameraOptions
from edge_agent.data import Captured, Image, VideoFormat
from edge_agent.errors import EndOfStream, SourceError
from edge_agent.frames import FramePool
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.sources import Source


class ScriptedSource:
    """A fake source that does what it is told, read by read, and notes the order of calls."""

    Options: ClassVar[type[CameraOptions]] = CameraOptions
    is_live = True

    def __init__(self, *reads: Callable[[Image], Captured | None]) -> None:
        self._reads = iter(reads)
        self.calls: list[str] = []

    def check(self) -> Sequence[str]:
        return []

    def open(self) -> VideoFormat:
        self.calls.append("open")
        return VideoFormat(4, 2, 30.0)

    def read(self, into: Image) -> Captured | None:
        self.calls.append("read")
        return next(self._reads)(into)

    def close(self) -> None:
        self.calls.append("close")


def frame(into: Image) -> Captured | None:
    return Captured(into, 0)


def nothing(into: Image) -> Captured | None:
    return None


def lost(into: Image) -> Captured | None:
    raise SourceError("unplugged", reason="disconnected")


def ended(into: Image) -> Captured | None:
    raise EndOfStream("over")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_module, "backoff", lambda: iter(lambda: 0.0, None))


def run(source: Source) -> tuple[Camera, list[CameraState], FrameQueue]:
    frames = FrameQueue()
    frames.add_camera("a", QueueLimits(max_frames=100))
    states: list[CameraState] = []
    camera = Camera("a", source, frames=frames, pool=FramePool(), on_change=lambda camera: states.append(camera.state))
    camera.run()
    return camera, states, frames


def test_a_lost_source_is_closed_and_opened_again_and_numbers_go_on() -> None:
    source = ScriptedSource(frame, frame, lost, nothing, frame, ended)
    camera, states, frames = run(source)
    assert [(state.phase, state.reason) for state in states] == [
        ("connecting", None),
        ("running", None),
        ("backoff", "disconnected"),
        ("connecting", None),
        ("running", None),
        ("disabled", "end_of_stream"),
    ]
    assert source.calls == ["open", "read", "read", "read", "close", "open", "read", "read", "read", "close"]
    assert [f.seq for f in frames.take(10)] == [0, 1, 2]
    assert (camera.captured, camera.reconnects) == (3, 1)


def test_the_device_is_let_go_of_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ScriptedSource(lost, ended)
    at_wait: list[str] = []

    def note() -> float:
        at_wait.append(source.calls[-1])
        return 0.0

    monkeypatch.setattr(camera_module, "backoff", lambda: iter(note, None))
    run(source)
    assert at_wait == ["close"]


def test_a_camera_that_is_stopped_says_so() -> None:
    holder: list[Camera] = []

    def stop(into: Image) -> Captured | None:
        holder[0].stop()
        return None

    source = ScriptedSource(frame, stop)
    frames = FrameQueue()
    frames.add_camera("a", QueueLimits())
    camera = Camera("a", source, frames=frames, pool=FramePool())
    holder.append(camera)
    camera.run()
    assert (camera.state.phase, camera.state.message) == ("disabled", "stopped")
    assert camera.reconnects == 0
    assert source.calls[-1] == "close"


def test_buffers_that_are_given_back_are_lent_again() -> None:
    pool = FramePool(keep=2)
    a, b = pool.take((2, 4, 3)), pool.take((2, 4, 3))
    assert a is not b
    pool.give(a)
    assert pool.take((2, 4, 3)) is a
    pool.give(b)
    assert pool.take((3, 4, 3)).shape == (3, 4, 3)
    assert pool.take((2, 4, 3)) is b
    pool.give(a[:1])  # a view is not kept
    assert pool.take((1, 4, 3)).base is None
