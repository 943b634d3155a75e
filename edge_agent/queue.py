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
_CROWDED_NS = 2_000_000_000
_NEVER = -(1 << 63)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What one camera may keep waiting. `max_staleness_ms` 0: frames never grow stale.

    `max_frames` are for a hiccup. A lane that was full, and had to drop its oldest, shows an engine that is too slow:
    waiting only makes every frame later, so for two seconds the engine gets the newest, and older ones are dropped.
    """

    max_frames: int = 4
    max_bytes: int = 64_000_000
    drop: DropPolicy = "drop_oldest"
    max_staleness_ms: int = 1000


@dataclass(slots=True)
class _Lane:
    limits: QueueLimits
    has_room_again: threading.Condition
    frames: deque[Frame] = field(default_factory=deque)
    nbytes: int = 0
    drops: Counter[DropCause] = field(default_factory=Counter)
    crowded_until_ns: int = _NEVER

    def has_room(self, frame: Frame) -> bool:
        fits = self.nbytes + frame.image.nbytes <= self.limits.max_bytes
        return fits and len(self.frames) < self.limits.max_frames

    def append(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.nbytes += frame.image.nbytes

    def popleft(self) -> Frame:
        frame = self.frames.popleft()
        self.nbytes -= frame.image.nbytes
        self.has_room_again.notify()
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
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._is_closed = False
        self._is_nudged = False
        self._release = release
        self._clock_ns = clock_ns
        self.capacity = 0
        """How many frames may wait, of all cameras together."""

    def add_camera(self, name: str, limits: QueueLimits) -> None:
        """Open a lane, or change the limits of one; `put` takes frames of known cameras only."""
        with self._lock:
            if lane := self._lanes.get(name):
                lane.limits, lane.crowded_until_ns = limits, _NEVER
            else:
                lane = self._lanes[name] = _Lane(limits, threading.Condition(self._lock))
            lane.has_room_again.notify_all()
            self._count_capacity()

    def remove_camera(self, name: str) -> None:
        """Close a lane; what waits in it is dropped."""
        with self._lock:
            lane = self._lanes.pop(name, None)
            lost = self._empty(lane) if lane else []
            self._count_capacity()
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

    def take(self, max_batch: int = 1, *, window_s: float = 0.0, wait: bool = True, batches: int = 1) -> list[Frame]:
        """Up to `max_batch` frames, round the cameras in turn. For one thread at a time. The engine has room for so
        many `batches`: of crowded lanes no more is kept than these hold.

        Waits for the first as long as it takes, unless `wait` is False, and `window_s` at most for the batch
        to fill. Returns what there is, perhaps nothing, after a `nudge` or `close`.
        """
        unseen: list[Frame] = []
        with self._lock:
            batch = self._pick(max_batch, unseen, batches)
            while wait and not (batch or unseen or self._is_closed or self._is_nudged):
                self._has_frames.wait()
                batch = self._pick(max_batch, unseen, batches)
            if window_s > 0 and batch:
                self._fill(batch, max_batch, window_s, unseen)
            self._is_nudged = self._is_nudged and not wait
        for frame in unseen:
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
            for lane in self._lanes.values():
                lane.has_room_again.notify_all()
            self._has_frames.notify_all()

    def discard(self) -> None:
        """Drop all that waits, as `shutdown`."""
        with self._lock:
            lost = [frame for lane in self._lanes.values() for frame in self._empty(lane)]
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
            if lane.has_room(frame):
                return True
            if frame.image.nbytes > lane.limits.max_bytes or lane.limits.drop == "drop_newest":
                lane.drops["full"] += 1
                return False
            if lane.limits.drop == "block":
                lane.has_room_again.wait(_LOOK_S)
            else:
                lane.crowded_until_ns = self._clock_ns() + _CROWDED_NS
                dropped.append(self._crowd_out(lane))
        return False

    def _crowd_out(self, lane: _Lane) -> Frame:
        lane.drops["full"] += 1
        return lane.popleft()

    def _pick(self, max_batch: int, unseen: list[Frame], batches: int) -> list[Frame]:
        batch: list[Frame] = []
        for lane in self._lanes.values():
            self._drop_stale(lane, unseen)
        self._thin_crowded(max_batch * batches, unseen)
        while left := max_batch - len(batch):
            waiting = [name for name, lane in self._lanes.items() if lane.frames][:left]
            if not waiting:
                break
            for name in waiting:
                batch.append(self._lanes[name].popleft())
                self._lanes.move_to_end(name)  # whoever was served goes to the end of the round
        return batch

    def _thin_crowded(self, most: int, unseen: list[Frame]) -> None:
        """Drop the older frames of crowded lanes, where all together hold more than `most`."""
        now_ns = self._clock_ns()
        crowded = [name for name, lane in self._lanes.items() if now_ns < lane.crowded_until_ns]
        shares = self._shares(most) if crowded and most else {}
        for name in crowded:
            lane, share = self._lanes[name], shares.get(name, 0)
            while share and len(lane.frames) > share:
                unseen.append(self._crowd_out(lane))

    def _shares(self, most: int) -> dict[str, int]:
        """How many frames of each camera go into so many, round them in turn."""
        shares: dict[str, int] = {}
        while more := [name for name, lane in self._lanes.items() if len(lane.frames) > shares.get(name, 0)][:most]:
            for name in more:
                shares[name] = shares.get(name, 0) + 1
            most -= len(more)
        return shares

    def _fill(self, batch: list[Frame], max_batch: int, window_s: float, unseen: list[Frame]) -> None:
        until = time.monotonic() + window_s
        while len(batch) < max_batch and not self._is_closed and (left := until - time.monotonic()) > 0:
            self._has_frames.wait(left)
            batch += self._pick(max_batch - len(batch), unseen, 1)

    def _drop_stale(self, lane: _Lane, unseen: list[Frame]) -> None:
        oldest = self._oldest(lane)
        while lane.frames and lane.frames[0].captured_mono_ns < oldest:
            unseen.append(lane.popleft())
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
        lane.has_room_again.notify_all()
        return lost

    def _count_capacity(self) -> None:
        self.capacity = sum(lane.limits.max_frames for lane in self._lanes.values())
