"""One camera: the thread that owns its source, and how it fares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from edge_agent.backoff import backoff
from edge_agent.data import Captured, Frame, VideoFormat
from edge_agent.errors import EndOfStream, SourceError, SourceReason
from edge_agent.frames import FramePool
from edge_agent.messages import CameraPhase
from edge_agent.queue import FrameQueue
from edge_agent.sources import Source

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CameraState:
    """What a camera does, since when (wall time, ns), and why if it does not run."""

    phase: CameraPhase
    reason: SourceReason | None = None
    message: str | None = None
    format: VideoFormat | None = None
    since_ns: int = field(default_factory=time.time_ns)


class Camera:
    """Reads a source into a queue, and opens it again after a while when it is lost.

    `run` is the body of the camera's thread; `on_change` is called there with every new state.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        frames: FrameQueue,
        pool: FramePool,
        on_change: Callable[[Camera], None] = lambda camera: None,
    ) -> None:
        self.name = name
        self.state = CameraState("connecting")
        self.captured = 0
        self.reconnects = 0
        self._source = source
        self._frames = frames
        self._pool = pool
        self._on_change = on_change
        self._stopping = threading.Event()

    def disable(self) -> None:
        """Say that this camera is not to run."""
        self.state = CameraState("disabled", message="enabled = false in the configuration")

    def stop(self) -> None:
        """Ask the thread to end after the read it is in. May be called from any thread."""
        self._stopping.set()

    def run(self) -> None:
        """Capture until `stop`, or until a source that ends has ended."""
        delays = backoff()
        while not self._stopping.is_set():
            before = self.captured
            try:
                self._open_and_capture()
            except EndOfStream as error:
                self._enter(CameraState("disabled", error.reason, str(error)))
                return
            except SourceError as error:
                self._enter(CameraState("backoff", error.reason, str(error)))
            if not self._stopping.is_set():
                self.reconnects += 1
                delays = backoff() if self.captured > before else delays
                self._stopping.wait(next(delays))
        self._enter(CameraState("disabled", message="stopped"))

    def _open_and_capture(self) -> None:
        """One connection; the device is let go of before anything else is done."""
        try:
            self._enter(CameraState("connecting"))
            opened = self._source.open()
            self._enter(CameraState("running", format=opened))
            self._capture(opened)
        finally:
            self._source.close()

    def _capture(self, opened: VideoFormat) -> None:
        shape = (opened.height, opened.width, 3)
        while not self._stopping.is_set():
            buffer = self._pool.take(shape)
            captured = self._source.read(buffer)
            if captured is None or captured.image is not buffer:
                self._pool.give(buffer)
            if captured is not None:
                shape = captured.image.shape
                self._frames.put(self._frame(captured))

    def _frame(self, captured: Captured) -> Frame:
        frame = Frame(self.name, self.captured, captured.image, captured.captured_at_ns, time.monotonic_ns())
        self.captured += 1
        return frame

    def _enter(self, state: CameraState) -> None:
        self.state = state
        tell = log.warning if state.phase == "backoff" else log.debug if state.phase == "connecting" else log.info
        tell(f"camera.{state.phase}", camera=self.name, **_facts(state))
        self._on_change(self)


def _facts(state: CameraState) -> dict[str, object]:
    facts: dict[str, object] = {}
    if state.message:
        facts |= {"reason": state.reason, "message": state.message}
    if state.format:
        facts |= {"width": state.format.width, "height": state.format.height, "fps": state.format.fps}
    return facts
