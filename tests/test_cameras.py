"""Cameras that come, go and change at run time; devices that are plugged in; the quality of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import config, sources
from edge_agent.camera import Camera
from edge_agent.cameras import Cameras
from edge_agent.config import CameraOptions, QueueOptions
from edge_agent.connection import ConnectionQuality
from edge_agent.data import Frame
from edge_agent.errors import SourceError
from edge_agent.frames import FramePool
from edge_agent.hotplug import DeviceWatch
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.sources.synthetic import SyntheticSource
from tests.test_queue import frame


class Plugged(SyntheticSource):
    """A fake camera that is there while its file is."""

    hotplug = "video*"
    path = Path()

    def open(self) -> Any:
        if not self.path.exists():
            raise SourceError("not plugged in", reason="device_not_found")
        return super().open()


def options(**more: Any) -> CameraOptions:
    raw = {"source": "synthetic", "fps": 50.0, "width": 64, "height": 48, "max_staleness_ms": 0, **more}
    return config.parse({"cameras": {"c": raw}}).cameras["c"]


class House:
    """Cameras of an agent without the rest of it: what they do is told in order."""

    def __init__(self, folder: Path) -> None:
        self.frames = FrameQueue()
        self.told: list[tuple[str, str]] = []
        self.removed: list[str] = []
        self.cameras = Cameras(
            frames=self.frames,
            pool=FramePool(),
            film_frames=4,
            queue=QueueOptions(max_frames=1000),
            on_change=self._on_change,
            on_removed=self.removed.append,
        )
        self.folder = folder

    def add(self, name: str, wanted: CameraOptions) -> Camera:
        return self.cameras.add(name, wanted, sources.make(wanted))

    async def until(self, condition: Callable[[], Any], *, timeout_s: float = 10.0) -> None:
        async def watch() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(watch(), timeout_s)

    async def runs(self, name: str) -> None:
        await self.until(lambda: self.cameras[name].state.phase == "running")

    def taken(self) -> list[Frame]:
        self.frames.nudge()
        return self.frames.take(10_000)

    def _on_change(self, camera: Camera) -> None:
        self.told.append((camera.name, camera.state.phase))


def live_in(folder: Path, test: Callable[[House], Awaitable[None]]) -> House:
    async def run() -> House:
        house = House(folder)
        devices = DeviceWatch(str(folder))
        house.add("steady", options())
        async with house.cameras.running(devices, timeout_s=lambda: 5.0):
            await house.runs("steady")
            await asyncio.wait_for(test(house), 20)
        devices.close()
        seqs = [frame.seq for frame in house.taken() if frame.camera == "steady"]
        assert seqs == list(range(len(seqs))), "the other camera noticed nothing"
        assert house.told.count(("steady", "running")) == 1
        return house

    return asyncio.run(run())


def test_a_camera_is_added_and_removed_while_another_runs(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        house.add("new", options())
        await house.runs("new")
        with pytest.raises(ValueError, match="already"):
            house.add("new", options())
        await house.until(lambda: house.frames.waiting("new") > 3)
        await house.cameras.remove("new")
        assert "new" not in house.cameras
        assert house.frames.waiting("new") == 0
        with pytest.raises(KeyError):
            await house.cameras.remove("new")
        house.add("new", options())  # the name is free again
        await house.runs("new")

    house = live_in(tmp_path, test)
    assert house.removed == ["new"]
    assert house.cameras["new"].quality.captured < 1000


def test_a_camera_is_disabled_enabled_and_changed(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        camera = house.add("other", options(enabled=False))
        assert camera.state.phase == "disabled"
        camera.enable()
        await house.runs("other")
        camera.disable()
        await house.until(lambda: camera.state.phase == "disabled")
        assert camera.state.message == "disabled by command"
        camera.enable()
        await house.runs("other")
        wider = options(width=96)
        house.cameras.change("other", wider, sources.make(wider))
        await house.until(lambda: camera.state.format and camera.state.format.width == 96)
        gone = options(enabled=False)
        house.cameras.change("other", gone, sources.make(gone))
        await house.until(lambda: camera.state.phase == "disabled")

    house = live_in(tmp_path, test)
    assert house.told[-1][1] == "disabled"


def test_a_camera_that_is_plugged_in_is_opened_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plugged, "path", tmp_path / "video7")
    monkeypatch.setattr("edge_agent.camera.backoff", lambda **most: iter(lambda: 3600.0, None))

    async def test(house: House) -> None:
        house.add("usb", options(source="tests.test_cameras:Plugged"))
        await house.until(lambda: house.cameras["usb"].state.phase == "backoff")
        (tmp_path / "tty7").touch()
        await asyncio.sleep(0.05)
        assert house.cameras["usb"].state.phase == "backoff", "another device does not matter"
        (tmp_path / "video7").touch()
        await house.runs("usb")

    live_in(tmp_path, test)


def test_without_inotify_the_agent_lives_on(tmp_path: Path) -> None:
    watch = DeviceWatch(str(tmp_path / "nowhere"))
    with watch.telling(lambda name: None):
        pass
    watch.close()


# The queue's part in it


def test_a_removed_lane_drops_what_waits_and_takes_no_more() -> None:
    released: list[Frame] = []
    queue = FrameQueue(release=released.append)
    queue.add_camera("a", QueueLimits(max_frames=10, max_staleness_ms=0))
    for seq in range(3):
        assert queue.put(frame("a", seq))
    queue.remove_camera("a")
    queue.remove_camera("a")
    assert [f.seq for f in released] == [0, 1, 2]
    assert not queue.put(frame("a", 3))
    assert [f.seq for f in released] == [0, 1, 2, 3]
    assert queue.drops("a") == {}
    assert not queue.is_stale("a", 0)


def test_a_frame_that_is_no_longer_wanted_is_not_put() -> None:
    queue = FrameQueue()
    queue.add_camera("a", QueueLimits(max_frames=1, drop="block"))
    assert queue.put(frame("a", 0))
    looks = iter((True, True, False))
    assert not queue.put(frame("a", 1), is_wanted=lambda: next(looks))
    assert queue.drops("a") == {"shutdown": 1}


# The quality of a connection


@settings(max_examples=50, deadline=None)
@given(
    fps=st.floats(0.5, 60.0),
    minutes=st.integers(1, 180),
    losses=st.lists(st.integers(0, 179), max_size=20),
)
def test_the_last_hour_is_what_it_was(fps: float, minutes: int, losses: list[int]) -> None:
    now_s = 1000.0
    quality = ConnectionQuality(clock=lambda: now_s)
    step_s = max(1 / fps, 0.5)
    until_s = now_s + minutes * 60
    lost = 0
    pending = sorted(1000.0 + minute * 60 + 7 for minute in losses if minute < minutes - 1)
    while now_s < until_s:
        quality.on_picture(int(now_s * 1e9), now_s)
        while pending and pending[0] <= now_s:
            pending.pop(0)
            quality.on_loss("timeout")
            lost += 1
        now_s += step_s
    hour = quality.last_hour()
    assert hour.fps == pytest.approx(1 / step_s, rel=0.05, abs=0.02)
    assert hour.jitter_ms == pytest.approx(0.0, abs=0.01)
    assert hour.reconnects <= quality.reconnects == lost
    recent = [minute for minute in losses if minute < minutes - 1 and minutes - minute <= 58]
    assert hour.reconnects >= len(recent)


def test_a_name_is_free_again_only_when_nothing_of_the_camera_is_left(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        house.add("new", options())
        await house.runs("new")
        removing = asyncio.ensure_future(house.cameras.remove("new"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="already"):
            house.add("new", options())
        await removing
        house.add("new", options())
        await house.until(lambda: house.frames.waiting("new") > 3)

    live_in(tmp_path, test)


def test_a_removal_that_is_cancelled_leaves_nothing_half_done(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        house.add("new", options())
        await house.runs("new")
        removing = asyncio.ensure_future(house.cameras.remove("new"))
        await asyncio.sleep(0)
        removing.cancel()
        await asyncio.wait((removing,))
        assert "new" not in house.cameras
        house.add("new", options())
        await house.runs("new")

    assert live_in(tmp_path, test).removed == ["new"]


def test_a_closed_camera_is_not_brought_back_by_a_change(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        camera = house.add("new", options())
        await house.runs("new")
        camera.close()
        house.cameras.change("new", options(), sources.make(options()))
        await house.until(lambda: camera.state.phase == "disabled")
        camera.enable()
        assert camera.step() is None

    live_in(tmp_path, test)


def test_a_camera_whose_queue_is_always_full_runs_all_the_same(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        eager = options(pace="fast", max_frames=2)
        house.add("eager", eager)
        await house.runs("eager")
        assert house.frames.waiting("eager") == 2

    live_in(tmp_path, test)
