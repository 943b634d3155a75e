"""Cameras read as the agent reads them, by its own sessions and its own queue, without an agent."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from edge_agent import sources
from edge_agent.camera import Camera
from edge_agent.config import CameraOptions, QueueOptions
from edge_agent.data import Frame, VideoFormat
from edge_agent.errors import SourceReason
from edge_agent.frames import FramePool
from edge_agent.queue import FrameQueue, QueueLimits
from edge_agent.threads import spawn

_LOOK_S = 0.05
_LEAVE_S = 3.0
_BATCH = 16
_GAP = 1.75  # times the usual interval

Stamp = tuple[int, int]
"""A frame's number and when it was captured, monotonic ns."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a camera does not deliver, or does not any more."""

    reason: SourceReason
    message: str


@dataclass(frozen=True, slots=True)
class Timing:
    """How evenly frames came. Of the intervals between two that follow each other: their standard deviation is the
    jitter, those of more than 1.75 medians are gaps, and `missing` is how many frames would have filled them. None
    where there are too few."""

    fps: float | None
    interval_ms: float | None
    jitter_ms: float | None
    longest_ms: float | None
    gaps: int | None
    missing: int | None


class Follower:
    """One camera as it is read: what the agent would tell of it, and its frames. `stamps` only if they are kept."""

    def __init__(self, camera: Camera, frames: FrameQueue, *, is_live: bool, keeps_stamps: bool) -> None:
        self.camera = camera
        self.is_live = is_live
        self.frames = 0
        self.nbytes = 0
        self.stamps: list[Stamp] = []
        self.format: VideoFormat | None = None
        self.failure: Failure | None = None
        self.has_ended = False
        self.stalls = 0
        self._queue = frames
        self._keeps_stamps = keeps_stamps

    @property
    def name(self) -> str:
        return self.camera.name

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.failure is not None

    @property
    def drops(self) -> Mapping[str, int]:
        """Frames that were captured and would not have been inferred, by cause."""
        return {str(cause): count for cause, count in self._queue.drops(self.name).items() if count}

    @property
    def cpu_s(self) -> float | None:
        """What the thread that reads it has used; None where there is none."""
        for thread in threading.enumerate():
            if thread.name == f"capture:{self.name}" and thread.native_id is not None:
                try:
                    return time.clock_gettime((~thread.native_id << 3) | 6)  # MAKE_THREAD_CPUCLOCK of glibc
                except OSError:  # it has just ended
                    return None
        return None

    def took(self, frame: Frame) -> None:
        self.frames += 1
        self.nbytes += frame.image.nbytes
        height, width = frame.image.shape[:2]
        nominal = self.camera.state.format
        self.format = VideoFormat(width, height, nominal.fps if nominal else None)
        if self._keeps_stamps:
            self.stamps.append((frame.seq, frame.captured_mono_ns))

    def changed(self) -> None:
        """The camera has another state: the first loss of the connection is the end of it here."""
        state = self.camera.state
        if state.phase == "stalled":
            self.stalls += 1
        if state.phase == "backoff" and self.failure is None:
            self.failure = Failure(state.reason or "error", state.message or "it does not deliver")
        if state.phase == "disabled" and state.reason == "end_of_stream":
            self.has_ended = True


class Reading:
    """Cameras that run. `step` is to be called again and again, by one thread; `take` is called for each frame, in
    another one, and may keep the picture only by copying it."""

    def __init__(
        self, cameras: Mapping[str, CameraOptions], take: Callable[[Follower, Frame], None], *, keeps_stamps: bool
    ) -> None:
        self._frames = FrameQueue(release=lambda frame: self._pool.give(frame.image))
        self._pool = FramePool()
        self._news = threading.Event()
        self._take = take
        self.followers = {name: self._follower(name, options, keeps_stamps) for name, options in cameras.items()}
        self._taker = threading.Thread(target=self._run, name="take", daemon=True)
        self._taker.start()

    def step(self) -> None:
        """Do what is due with each camera, and wait a little."""
        for follower in self.followers.values():
            if not follower.is_over:
                follower.camera.step()
        self._news.wait(_LOOK_S)
        self._news.clear()

    def close(self) -> None:
        """Let go of all cameras; a driver that hangs is left behind."""
        for follower in self.followers.values():
            follower.camera.close()
        until_s = time.monotonic() + _LEAVE_S
        left = [follower.camera for follower in self.followers.values()]
        while left and time.monotonic() < until_s:
            left = [camera for camera in left if camera.step() is not None]
            self._news.wait(0.01)
            self._news.clear()
        self._frames.close()
        self._taker.join(_LEAVE_S)

    def _follower(self, name: str, options: CameraOptions, keeps_stamps: bool) -> Follower:
        like = sources.make(options)
        queue = QueueOptions()
        limits = QueueLimits(
            max_frames=options.max_frames or queue.max_frames,
            max_bytes=int(queue.max_mb * 1e6),
            drop=options.drop or ("drop_oldest" if like.is_live else "block"),
            max_staleness_ms=queue.max_staleness_ms if options.max_staleness_ms is None else options.max_staleness_ms,
        )
        self._frames.add_camera(name, limits)
        camera = Camera(
            name,
            options,
            partial(sources.make, options),
            is_live=like.is_live,
            frames=self._frames,
            pool=self._pool,
            spawn=spawn,
            wake=self._news.set,
            on_change=lambda camera: self.followers[camera.name].changed(),
        )
        return Follower(camera, self._frames, is_live=like.is_live, keeps_stamps=keeps_stamps)

    def _run(self) -> None:
        while True:
            batch = self._frames.take(_BATCH)
            if not batch and self._frames.is_closed:
                return
            for frame in batch:
                follower = self.followers[frame.camera]
                follower.took(frame)
                self._take(follower, frame)
                self._pool.give(frame.image)
            self._news.set()


@contextmanager
def reading(
    cameras: Mapping[str, CameraOptions],
    take: Callable[[Follower, Frame], None] = lambda follower, frame: None,
    *,
    keeps_stamps: bool = False,
) -> Iterator[Reading]:
    """Cameras by name, connected to; let go of at the end. Raises `ConfigError` where a source lacks something."""
    running = Reading(cameras, take, keeps_stamps=keeps_stamps)
    try:
        yield running
    finally:
        running.close()


def timing(stamps: Sequence[Stamp]) -> Timing:
    """How evenly these frames came; see `Timing`. A frame that was dropped in between makes no gap."""
    following = [
        (after - before) / 1e6
        for (number, before), (next_number, after) in itertools.pairwise(stamps)
        if next_number == number + 1
    ]
    if not following:
        return Timing(None, None, None, None, None, None)
    usual_ms = statistics.median(following)
    long = [interval for interval in following if usual_ms > 0 and interval > _GAP * usual_ms]
    span_ms = (stamps[-1][1] - stamps[0][1]) / 1e6
    numbers = stamps[-1][0] - stamps[0][0]
    return Timing(
        fps=round(1e3 * numbers / span_ms, 2) if span_ms > 0 else None,
        interval_ms=round(usual_ms, 3),
        jitter_ms=round(statistics.pstdev(following), 3) if len(following) > 1 else None,
        longest_ms=round(max(following), 3),
        gaps=len(long),
        missing=sum(math.floor(interval / usual_ms + 0.5) - 1 for interval in long),
    )
