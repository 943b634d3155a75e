"""One connection to a camera: the body of the thread that opens a source, reads it into the queue and closes it.

Keeps facts that others may look at; what is made of them is decided in `camera`.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable

import numpy as np

from edge_agent.connection import ConnectionQuality
from edge_agent.data import Frame, Image, VideoFormat
from edge_agent.errors import SourceError, SourceReason
from edge_agent.frames import FramePool
from edge_agent.queue import DropCause, FrameQueue
from edge_agent.sources import Source

_STILL_LOOK_NS = 1_000_000_000  # between two looks at whether the picture has changed


class Session:
    """`run` is for one thread; `cancel` and the facts are for others.

    `make` gives a new source, `news` is called (in this thread) when a look at the facts is worthwhile.
    """

    def __init__(
        self,
        camera: str,
        make: Callable[[], Source],
        *,
        frames: FrameQueue,
        pool: FramePool,
        quality: ConnectionQuality,
        still: StillPicture,
        fps: float | None = None,
        news: Callable[[], None] = lambda: None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.camera = camera
        self.format: VideoFormat | None = None
        self.alive_at_s = clock_ns() / 1e9
        self.has_delivered = False
        self.is_delivering = False
        self.complaint: SourceError | None = None
        self.error: BaseException | None = None
        self.is_over = False
        self.left_at_s = 0.0
        """When its thread was left behind, if it was."""
        self._make = make
        self._frames = frames
        self._pool = pool
        self._quality = quality
        self._still = still
        self._thinner = Thinner(fps) if fps else None
        self._news = news
        self._clock_ns = clock_ns
        self._cancelled = threading.Event()
        self._source: Source | None = None
        self._shape: tuple[int, ...] = ()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self, error: SourceError | None = None) -> None:
        """Ask the thread to end after the call it is in, as failed with `error` if given; from now on no
        frame of it reaches the queue."""
        self.error = self.error or error
        self._cancelled.set()

    def run(self) -> None:
        """Open, read until cancelled or lost, close."""
        try:
            self.open()
            while not self.is_cancelled:
                self.step()
        except BaseException as error:  # noqa: BLE001  a driver or a plug-in may raise anything; `camera` tells of it
            self.error = self.error or error
        finally:
            self.close()

    def open(self) -> None:
        """Connect. Raises what the source raises."""
        self._source = self._make()
        self.format = self._source.open()
        self._shape = (self.format.height, self.format.width, 3)
        self.alive_at_s = self._clock_ns() / 1e9
        self._news()

    def step(self) -> None:
        """The next picture into the queue, if one came in time and is wanted."""
        assert self._source is not None, "open() comes first"
        captured_ns = self._source.grab()
        grabbed_ns = self._clock_ns()
        if captured_ns is None or self.is_cancelled:
            return
        if self._frames.is_stale(self.camera, captured_ns):
            self._drop("stale")
            self._complain("pictures arrive too late to be of use", "stalled")
            return
        if self._thinner and not self._thinner.wants(captured_ns):
            self._quality.skipped += 1
            if self.complaint is None:  # else only a picture that was looked at can say that all is well again
                self._live(captured_ns)
            return
        self._deliver(self._source, captured_ns, grabbed_ns)

    def close(self) -> None:
        """Let go of the device, and say that this session is over."""
        try:
            if self._source is not None:
                self._source.close()
        except BaseException as error:  # noqa: BLE001  as in `run`
            self.error = self.error or error
        self.is_over = True
        self._news()

    def _deliver(self, source: Source, captured_ns: int, grabbed_ns: int) -> None:
        buffer = self._pool.take(self._shape)
        image = source.retrieve(buffer)
        if image is None:
            self._pool.give(buffer)
            self._drop("damaged")
            self._complain("pictures arrive damaged", "error")
            return
        if image is not buffer:
            image = self._pool.exchange(buffer, image)
        self._shape = image.shape
        still_s = self._still.lasts_s(image, captured_ns)
        if self.is_cancelled:
            self._pool.give(image)
        elif still_s:
            self._drop("frozen")
            self._pool.give(image)
            self._complain(f"the same picture for {still_s:.0f} s", "frozen")
        else:
            self._live(captured_ns)
            self._follow(image)
            now_ns = self._clock_ns()
            self._quality.on_delivery((now_ns - grabbed_ns) / 1e6, now_ns / 1e9)
            self.is_delivering = True
            self._frames.put(self._frame(image, captured_ns), is_wanted=lambda: not self.is_cancelled)
            self.is_delivering = False

    def _follow(self, image: Image) -> None:
        """Notice the first picture, and one of another size."""
        assert self.format is not None
        height, width = image.shape[:2]
        resized = (width, height) != (self.format.width, self.format.height)
        if resized:
            self.format = VideoFormat(width, height, self.format.fps)
        if resized or not self.has_delivered:
            self.has_delivered = True
            self._news()

    def _complain(self, message: str, reason: SourceReason) -> None:
        """Pictures come, and are of no use; they do not count as a sign of life."""
        is_new = self.complaint is None
        self.complaint = SourceError(message, reason=reason)
        if is_new:
            self._news()

    def _live(self, captured_ns: int) -> None:
        now_s = self._clock_ns() / 1e9
        recovered = self.complaint is not None or now_s - self.alive_at_s > 1.0
        self.complaint = None
        self.alive_at_s = now_s
        self._quality.on_picture(captured_ns, now_s)
        if recovered:
            self._news()

    def _drop(self, cause: DropCause) -> None:
        self._quality.next_seq()
        self._frames.count_drop(self.camera, cause)

    def _frame(self, image: Image, captured_ns: int) -> Frame:
        wall_ns = time.time_ns() - (self._clock_ns() - captured_ns)
        return Frame(self.camera, self._quality.next_seq(), image, wall_ns, captured_ns)


class Thinner:
    """Passes `fps` pictures a second of a faster stream, evenly."""

    def __init__(self, fps: float) -> None:
        self._period_ns = int(1e9 / fps)
        self._due_ns: int | None = None

    def wants(self, captured_ns: int) -> bool:
        """Whether the picture captured then is one of those to pass. Times must not run backwards."""
        if self._due_ns is None:
            self._due_ns = captured_ns
        if captured_ns < self._due_ns - self._period_ns // 10:  # a camera's clock is not that exact
            return False
        self._due_ns = max(self._due_ns + self._period_ns, captured_ns)
        return True


class StillPicture:
    """Knows how long a camera has shown the very same picture; it outlives the sessions of a camera.

    A sensor's noise makes no two pictures the same, so that one that lasts comes from an encoder that
    hangs. `limit_s` 0: never complains.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_ns = int(limit_s * 1e9)
        self._hash = 0
        self._since_ns = 0
        self._looked_ns: int | None = None

    def lasts_s(self, image: Image, captured_ns: int) -> float:
        """For how many seconds this picture has been shown; 0 while that is not worth a complaint.

        Every pixel counts, and so it looks once a second: some 1.5 ms at 1920x1080 on an x86 core.
        """
        if not self._limit_ns:
            return 0.0
        if self._looked_ns is None or captured_ns - self._looked_ns >= _STILL_LOOK_NS:
            hashed = zlib.crc32(np.ascontiguousarray(image))
            if hashed != self._hash or self._looked_ns is None:
                self._hash, self._since_ns = hashed, captured_ns
            self._looked_ns = captured_ns
        still_ns = captured_ns - self._since_ns
        return still_ns / 1e9 if still_ns >= self._limit_ns else 0.0
