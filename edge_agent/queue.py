"""Frames on their way to the engine: bounded, in a lane a camera, and what is dropped is counted with its cause."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edge_agent.config import DropPolicy
from edge_agent.data import Frame

DropCause = Literal["full", "stale", "frozen", "damaged", "no_memory", "shutdown"]

_LOOK_S = 0.2  # how often a blocked putter looks whether its frame is still wanted
_CROWDED_FRAMES = 2
_CROWDED_NS = 2_000_000_000
_NEVER = -(1 << 63)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What one camera may keep waiting. `max_staleness_ms` 0: frames never grow stale.

    `max_frames` are for a hiccup. Where `drop_oldest` had to drop, the engine is too slow, and a longer line only makes
    every frame later: for two seconds no more than the two newest wait.
    """

    max_frames: int = 4
    max_bytes: int = 64_000_000
    drop: DropPolicy = "drop_oldest"
    max_staleness_ms: int = 1000


@dataclass(slots=True)
class _Lane:
    limits: QueueLimits
    frames: deque[Frame] = field(default_factory=deque)
    nbytes: int = 0
    drops: Counter[DropCause] = field(default_factory=Counter)
    crowded_until_ns: int = _NEVER

    def has_room(self, frame: Frame, now_ns: int) -> bool:
        most = (
            self.limits.max_frames if now_ns >= self.crowded_until_ns else min(_CROWDED_FRAMES, self.limits.max_frames)
        )
        return len(self.frames) < most and self.nbytes + frame.image.nbytes <= self.limits.max_bytes

    def append(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.nbytes += frame.image.nbytes

    def popleft(self) -> Frame:
        frame = self.frames.popleft()
        self.nbytes -= frame.image.nbytes
        return frame


class FrameQueue:
    """Frames of all cameras, each in a lane of its own; capture threads put, the engine's thread takes.

    `release` is called with every frame that is dropped, from the thread that drops it.
    """

    def __init__(
        self,
        *,
        release: Callable[[Frame], None] = lambda frame: None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        lock = threading.Lock()
        self._lock = lock
        self._has_frames = threading.Condition(lock)
        self._has_room = threading.Condition(lock)
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._is_closed = False
        self._is_nudged = False
        self._release = release
        self._clock_ns = clock_ns

    def add_camera(self, name: str, limits: QueueLimits) -> None:
        """Open a lane, or change the limits of one; `put` takes frames of known cameras only."""
        with self._lock:
            if lane := self._lanes.get(name):
                lane.limits = limits
            else:
                self._lanes[name] = _Lane(limits)
            self._has_room.notify_all()

    def remove_camera(self, name: str) -> None:
        """Close a lane; what waits in it is dropped."""
        with self._lock:
            lane = self._lanes.pop(name, None)
            lost = self._empty(lane) if lane else []
            self._has_room.notify_all()
        for frame in lost:
            self._release(frame)

    def is_stale(self, camera: str, captured_mono_ns: int) -> bool:
        """Whether a picture captured then would be too old to be queued."""
        with self._lock:
            lane = self._lanes.get(camera)
            return lane is not None and captured_mono_ns < self._oldest(lane)

    def count_drop(self, camera: str, cause: DropCause) -> None:
        """A captured picture was dropped before it was queued, or after it was taken."""
        with self._lock:
            if lane := self._lanes.get(camera):
                lane.drops[cause] += 1

    def put(self, frame: Frame, *, is_wanted: Callable[[], bool] = lambda: True) -> bool:
        """Queue a frame, by its camera's policy; False if this very frame was dropped.

        Never blocks unless the policy is `block`; then until there is room, or until `close`, or until
        `is_wanted` turns false (a frame that is no longer wanted is dropped as `shutdown`).
        """
        dropped: list[Frame] = []
        with self._lock:
            accepted = self._make_room(frame, dropped, is_wanted)
            if accepted:
                self._lanes[frame.camera].append(frame)
                self._has_frames.notify()
            else:
                dropped.append(frame)
        for lost in dropped:
            self._release(lost)
        return accepted

    def take(self, max_batch: int = 1, *, window_s: float = 0.0, wait: bool = True) -> list[Frame]:
        """Up to `max_batch` frames, round the cameras in turn. For one thread at a time.

        Waits for the first as long as it takes, unless `wait` is False, and `window_s` at most for the batch
        to fill. Returns what there is, perhaps nothing, after a `nudge` or `close`.
        """
        stale: list[Frame] = []
        with self._lock:
            batch = self._pick(max_batch, stale)
            while wait and not (batch or stale or self._is_closed or self._is_nudged):
                self._has_frames.wait()
                batch = self._pick(max_batch, stale)
            if window_s > 0 and batch:
                self._fill(batch, max_batch, window_s, stale)
            self._is_nudged = self._is_nudged and not wait
        for frame in stale:
            self._release(frame)
        return batch

    def nudge(self) -> None:
        """Let a `take` that waits return, since there is something else to do."""
        with self._lock:
            self._is_nudged = True
            self._has_frames.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Take no more frames in; what waits can still be taken. Frees blocked putters and takers."""
        with self._lock:
            self._is_closed = True
            self._has_room.notify_all()
            self._has_frames.notify_all()

    def discard(self) -> None:
        """Drop all that waits, as `shutdown`."""
        with self._lock:
            lost = [frame for lane in self._lanes.values() for frame in self._empty(lane)]
            self._has_room.notify_all()
        for frame in lost:
            self._release(frame)

    def drops(self, camera: str) -> Mapping[DropCause, int]:
        """How many frames of a camera were dropped since the start, by cause."""
        with self._lock:
            lane = self._lanes.get(camera)
            return dict(lane.drops) if lane else {}

    def waiting(self, camera: str) -> int:
        """How many frames of a camera wait now."""
        with self._lock:
            lane = self._lanes.get(camera)
            return len(lane.frames) if lane else 0

    # Below, the lock is held.

    def _make_room(self, frame: Frame, dropped: list[Frame], is_wanted: Callable[[], bool]) -> bool:
        while (lane := self._lanes.get(frame.camera)) is not None:
            if self._is_closed or not is_wanted():
                lane.drops["shutdown"] += 1
                return False
            now_ns = self._clock_ns()
            if lane.has_room(frame, now_ns):
                return True
            if frame.image.nbytes > lane.limits.max_bytes or lane.limits.drop == "drop_newest":
                lane.drops["full"] += 1
                return False
            if lane.limits.drop == "block":
                self._has_room.wait(_LOOK_S)
            else:
                lane.crowded_until_ns = now_ns + _CROWDED_NS
                dropped.append(lane.popleft())
                lane.drops["full"] += 1
        return False

    def _pick(self, max_batch: int, stale: list[Frame]) -> list[Frame]:
        batch: list[Frame] = []
        served = True
        while served and len(batch) < max_batch:
            served = False
            for name in list(self._lanes):
                lane = self._lanes[name]
                self._drop_stale(lane, stale)
                if lane.frames and len(batch) < max_batch:
                    batch.append(lane.popleft())
                    self._lanes.move_to_end(name)  # whoever was served goes to the end of the round
                    served = True
        if batch or stale:
            self._has_room.notify_all()
        return batch

    def _fill(self, batch: list[Frame], max_batch: int, window_s: float, stale: list[Frame]) -> None:
        until = time.monotonic() + window_s
        while len(batch) < max_batch and not self._is_closed and (left := until - time.monotonic()) > 0:
            self._has_frames.wait(left)
            batch += self._pick(max_batch - len(batch), stale)

    def _drop_stale(self, lane: _Lane, stale: list[Frame]) -> None:
        oldest = self._oldest(lane)
        while lane.frames and lane.frames[0].captured_mono_ns < oldest:
            stale.append(lane.popleft())
            lane.drops["stale"] += 1

    def _oldest(self, lane: _Lane) -> int:
        """The capture time (monotonic ns) before which frames of a lane are stale."""
        limit_ns = lane.limits.max_staleness_ms * 1_000_000
        return self._clock_ns() - limit_ns if limit_ns and lane.limits.drop != "block" else _NEVER

    def _empty(self, lane: _Lane) -> list[Frame]:
        lane.drops["shutdown"] += len(lane.frames)
        lost = list(lane.frames)
        lane.frames.clear()
        lane.nbytes = 0
        return lost
