"""Cameras, queue and engine in one thread, by a clock that runs as fast as there is work: fake cameras, whose
faults come by a schedule, under the real `Camera`, `Session` and `FrameQueue`."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from edge_agent.camera import Camera, CameraState
from edge_agent.config import CameraOptions
from edge_agent.data import Frame, Image, VideoFormat
from edge_agent.errors import SourceError
from edge_agent.frames import FramePool
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.session import Session
from edge_agent.sources import LiveOptions

Fault = Literal["gone", "silent", "hung", "frozen", "held", "raises", "refuses", "damaged"]
SHAPE = (2, 4, 3)
POLL_S = 0.5
DAY_NS = 86_400 * 1_000_000_000


@dataclass
class FakeCamera:
    """A fake camera: pictures at `fps`, and faults, each from a time to a time (seconds)."""

    fps: float = 10.0
    faults: Sequence[tuple[float, float, Fault]] = ()
    nominal_fps: float | None = None
    raises: Callable[[], BaseException] = lambda: ZeroDivisionError("a bug")
    connections: int = 0
    open_now: int = 0
    sent: int = 0
    is_behind: bool = False  # pictures were held up on their way, and come in a burst

    def fault(self, now_s: float) -> Fault | None:
        return next((fault for begin, end, fault in self.faults if begin <= now_s < end), None)

    def until(self, now_s: float) -> float:
        """When the fault of now ends."""
        return next(end for begin, end, _ in self.faults if begin <= now_s < end)


class FakeSource:
    """One connection to a fake camera. A fake: nothing is captured."""

    Options: ClassVar[type[CameraOptions]] = CameraOptions
    is_live = True

    def __init__(self, camera: FakeCamera, now_s: Callable[[], float]) -> None:
        self._camera = camera
        self._now_s = now_s
        self._is_open = False
        self.next_s = 0.0

    def check(self) -> Sequence[str]:
        return []

    def open(self) -> VideoFormat:
        self._camera.connections += 1
        fault = self._camera.fault(self._now_s())
        if fault == "gone":
            raise SourceError("no such device", reason="device_not_found")
        if fault == "refuses":
            raise SourceError("refused", reason="refused")
        self._camera.open_now += 1
        self._is_open = True
        self.next_s = self._now_s() + 1 / self._camera.fps
        return VideoFormat(SHAPE[1], SHAPE[0], self._camera.nominal_fps)

    def grab(self) -> int | None:
        now_s = self._now_s()
        fault = self._camera.fault(now_s)
        if fault == "gone":
            raise SourceError("unplugged", reason="disconnected")
        if fault == "raises":
            raise self._camera.raises()
        if fault in ("silent", "refuses"):
            self.next_s = max(self.next_s, now_s)
        if fault in ("silent", "refuses", "held") or now_s < self.next_s - 1e-9:
            self._camera.is_behind = False
            return None
        captured_s, self.next_s = self.next_s, self.next_s + 1 / self._camera.fps
        self._camera.is_behind = self.next_s < now_s
        self._camera.sent += 1
        return DAY_NS + int(captured_s * 1e9)

    def retrieve(self, into: Image) -> Image | None:
        fault = self._camera.fault(self._now_s())
        if fault == "damaged":
            return None
        number = 0 if fault == "frozen" else self._camera.sent
        into[:] = np.frombuffer(number.to_bytes(4, "little"), np.uint8).repeat(6).reshape(SHAPE)
        return into

    def close(self) -> None:
        self._camera.open_now -= self._is_open
        self._is_open = False


@dataclass
class Told:
    """What an outsider saw of one camera: its states, each with its time, and its frames, unless they are only
    counted."""

    states: list[CameraState] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    count: int = 0

    @property
    def phases(self) -> list[tuple[str, str | None]]:
        return [(state.phase, state.reason) for state in self.states]


class Simulation:
    """Runs fake cameras until a time; then `told` holds what came of each. For days of it, cameras may be polled less
    often, and frames be counted only."""

    def __init__(
        self,
        fakes: dict[str, FakeCamera],
        *,
        options: dict[str, Any] | None = None,
        limits: QueueLimits | None = None,
        poll_s: float = POLL_S,
        keeps_frames: bool = True,
    ) -> None:
        self.now_ns = DAY_NS
        self._poll_s = poll_s
        self._keeps_frames = keeps_frames
        self.fakes = fakes
        self.told = {name: Told() for name in fakes}
        self.frames = FrameQueue(clock_ns=lambda: self.now_ns)
        self.cameras: dict[str, Camera] = {}
        self.most_waiting = 0
        self._order = itertools.count()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._looking: dict[str, int] = {}
        for name, fake in fakes.items():
            self.frames.add_camera(name, limits or QueueLimits())
            self._add(name, fake, LiveOptions(source="fake", **(options or {})))

    @property
    def now_s(self) -> float:
        return (self.now_ns - DAY_NS) / 1e9

    def run(self, until_s: float, *, engine_s: float = 0.02) -> None:
        """Let time pass; the engine takes a batch every `engine_s`."""
        for name in self.cameras:
            self._look(name)
        self.after(engine_s, lambda: self._infer(engine_s))
        until_ns = DAY_NS + int(until_s * 1e9)
        while self._events and self._events[0][0] <= until_ns:
            self.now_ns, _, event = heapq.heappop(self._events)
            event()
        self.now_ns = until_ns

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_ns + int(seconds * 1e9), next(self._order), event))

    def _add(self, name: str, fake: FakeCamera, options: CameraOptions) -> None:
        self.cameras[name] = Camera(
            name,
            options,
            lambda: FakeSource(fake, lambda: self.now_s),
            is_live=True,
            frames=self.frames,
            pool=FramePool(),
            spawn=lambda thread, work: self._spawn(fake, work),
            wake=lambda: self.after(0.0, lambda: self._look(name)),
            on_change=lambda camera: self._tell(self.told[name], camera),
            clock_ns=lambda: self.now_ns,
        )

    def _tell(self, told: Told, camera: Camera) -> None:
        told.states.append(camera.state)
        told.at_s.append(self.now_s)

    def _look(self, name: str) -> None:
        """What the camera's task does: step, and again when it wants, unless woken before."""
        turn = self._looking[name] = self._looking.get(name, 0) + 1
        wait_s = self.cameras[name].step()

        def again() -> None:
            if self._looking[name] == turn:
                self._look(name)

        if wait_s is not None:
            self.after(max(wait_s, 1e-6), again)

    def _spawn(self, fake: FakeCamera, work: Callable[[], None]) -> None:
        """A session's thread, whose steps are taken one by one; a hung one takes none."""
        session: Session = work.__self__  # type: ignore[attr-defined]
        self.after(0.01, lambda: self._advance(fake, session, session.open))

    def _advance(self, fake: FakeCamera, session: Session, step: Callable[[], None]) -> None:
        if fake.fault(self.now_s) == "hung":
            self.after(fake.until(self.now_s) - self.now_s + 1e-6, lambda: self._advance(fake, session, step))
            return
        try:
            if not session.is_cancelled:
                step()
        except BaseException as error:  # noqa: BLE001  as the session's own thread does
            session.error = session.error or error
        if session.error is not None or session.is_cancelled:
            session.close()
        else:
            wait_s = 0.001 if fake.is_behind else min(1 / fake.fps, self._poll_s)
            self.after(wait_s, lambda: self._advance(fake, session, session.step))

    def _infer(self, engine_s: float) -> None:
        self.most_waiting = max(self.most_waiting, *(self.frames.waiting(name) for name in self.cameras))
        if any(self.frames.waiting(name) for name in self.cameras):
            for frame in self.frames.take(8):
                told = self.told[frame.camera]
                told.count += 1
                if self._keeps_frames:
                    told.frames.append(frame)
        self.after(engine_s, lambda: self._infer(engine_s))
