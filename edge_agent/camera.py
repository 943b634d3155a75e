"""One camera: one session after the other, and what is done when one fails, hangs or tells nothing new.

`step` decides, from a session's facts and the time, and says when to look again. It owns no thread and
no clock: `spawn` starts a session's thread, and the tests run all of this by a clock of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from edge_agent.backoff import backoff
from edge_agent.config import CameraOptions
from edge_agent.connection import ConnectionQuality
from edge_agent.data import VideoFormat
from edge_agent.errors import EndOfStream, SourceError, SourceReason
from edge_agent.frames import FramePool
from edge_agent.messages import CameraPhase
from edge_agent.queue import FrameQueue
from edge_agent.session import Session, StillPicture
from edge_agent.sources import LiveOptions, Source

log = structlog.get_logger()

MAX_ABANDONED = 4
"""Threads of a camera that may hang in a driver at once; no more are started until one comes back."""

_GRACE_S = 2.0  # for a cancelled session to come back; a source's own time-outs may be a little late
_HEALTHY_S = 10.0  # a connection that held for so long starts the back-off anew
_IDLE_S = 3600.0


@dataclass(frozen=True, slots=True)
class CameraState:
    """What a camera does, since when (wall time, ns), and why if it does not run."""

    phase: CameraPhase
    reason: SourceReason | None = None
    message: str | None = None
    format: VideoFormat | None = None
    since_ns: int = field(default_factory=time.time_ns)


class Camera:
    """Keeps a source read into the queue for as long as it is wanted.

    All methods are for the event loop (or any one thread). `make` gives a source, `spawn` runs a session's
    body in a thread of that name, `wake` may be called there to ask for a `step`; `on_change` hears of every
    new state. `trouble` is why the camera does not run, through all attempts until it does again.
    """

    def __init__(
        self,
        name: str,
        options: CameraOptions,
        make: Callable[[], Source],
        *,
        is_live: bool,
        frames: FrameQueue,
        pool: FramePool,
        spawn: Callable[[str, Callable[[], None]], None],
        wake: Callable[[], None] = lambda: None,
        on_change: Callable[[Camera], None] = lambda camera: None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._clock_ns = clock_ns
        self.name = name
        self.options = options
        self.quality = ConnectionQuality(clock=self._now)
        self.state = CameraState("connecting")
        self.trouble: SourceReason | None = None
        self._make = make
        self._is_live = is_live
        self._frames = frames
        self._pool = pool
        self._spawn = spawn
        self._wake = wake
        self._on_change = on_change
        self._still = self._fresh_still()
        self._delays = self._fresh_delays()
        self._retry_at_s = 0.0
        self._session: Session | None = None
        self._started_at_s = 0.0
        self._running_since_s: float | None = None
        self._abandoned: list[Session] = []
        self._unwanted: CameraState | None = None
        self._is_closing = False
        self._ran_until_s = 0.0
        if not options.enabled:
            self.disable("enabled = false in the configuration")
            self.state = self._unwanted or self.state

    @property
    def hung(self) -> int:
        """Threads that were left behind and have not come back."""
        return sum(not session.is_over for session in self._abandoned)

    @property
    def period_s(self) -> float:
        """The time between two pictures that are wanted of it; 0 where nobody knows."""
        wanted = self.options.fps if isinstance(self.options, LiveOptions) else None
        rates = [rate for rate in (wanted, self.quality.nominal_fps) if rate]
        return 1 / min(rates) if rates else 0.0

    @property
    def stuck_s(self) -> float:
        """For how long a thread has not come back that the camera was to be read by, where no other reads it now."""
        if self.state.phase in ("running", "disabled"):
            return 0.0
        left_at = [session.left_at_s for session in self._abandoned if not session.is_over]
        return self._now() - max(min(left_at), self._ran_until_s) if left_at else 0.0

    def disable(self, message: str = "disabled by command") -> None:
        """Let go of the camera, until `enable`."""
        self._unwanted = CameraState("disabled", message=message)
        self._wake()

    def enable(self) -> None:
        """Connect, if the camera was disabled or had ended."""
        if self._unwanted is not None and not self._is_closing:
            self._unwanted = None
            self._try_now()

    def change(self, options: CameraOptions, make: Callable[[], Source], *, is_live: bool) -> None:
        """Go on with other options; counters and numbers go on too."""
        self.options, self._make, self._is_live = options, make, is_live
        self._still = self._fresh_still()
        self.trouble = None
        if self._session is not None and self._session.is_over:
            self._session = None  # however it ended, that was with the other options
        elif self._session is not None and not self._session.is_cancelled:
            self._cancel(self._session, None, self._now())
        if self._is_closing:
            return
        if options.enabled:
            self._unwanted = None
            self._try_now()
        else:
            self.disable("enabled = false in the configuration")

    def close(self) -> None:
        """Let go of the camera for good; `step` then returns None once that is done."""
        self._is_closing = True
        self.disable("stopped")

    def resume(self) -> None:
        """Try at once instead of waiting: something has changed that may help, such as a device that came."""
        if self.state.phase == "backoff":
            self._try_now()

    def step(self) -> float | None:
        """Do what is due. In how many seconds to look again at the latest; None when closed."""
        now_s = self._now()
        self._abandoned = [session for session in self._abandoned if not session.is_over]
        session = self._session
        if session is None:
            return self._without_session(now_s)
        if session.is_over:
            self._session = None
            self._after(session, now_s)
            return 0.0
        if self._unwanted is not None and not session.is_cancelled:
            self._cancel(session, None, now_s)
        return self._await_end(session, now_s) if session.is_cancelled else self._look_at(session, now_s)

    # The parts of a step

    def _without_session(self, now_s: float) -> float | None:
        if self._unwanted is not None:
            if self.state.phase != "disabled" or self._is_closing:
                self._enter(self._unwanted)
            return None if self._is_closing else _IDLE_S
        if now_s < self._retry_at_s:
            return self._retry_at_s - now_s
        if len(self._abandoned) >= MAX_ABANDONED:
            self._back_off(_all_hung(), now_s)
            return 0.0
        self._connect(now_s)
        return self.options.open_timeout_s

    def _connect(self, now_s: float) -> None:
        self._enter(CameraState("connecting"))
        self._started_at_s = now_s
        self._running_since_s = None
        self.quality.on_connect()
        self._session = Session(
            self.name,
            self._make,
            frames=self._frames,
            pool=self._pool,
            quality=self.quality,
            still=self._still,
            fps=self.options.fps if isinstance(self.options, LiveOptions) else None,
            news=self._wake,
            clock_ns=self._clock_ns,
        )
        self._spawn(f"capture:{self.name}", self._session.run)

    def _look_at(self, session: Session, now_s: float) -> float:
        if session.format is None:
            left_s = self._started_at_s + self.options.open_timeout_s + _GRACE_S - now_s
            if left_s <= 0:
                self._cancel(session, SourceError("it does not open in time", reason="timeout"), now_s)
            return max(left_s, 0.0)
        if session.is_delivering:  # perhaps it waits for room in the queue: not the camera's fault
            self._run(session.format, now_s)
            return self.options.stall_timeout_s
        patience_s = self._patience_s(session.format)
        silent_s = now_s - session.alive_at_s
        trouble = session.complaint or SourceError(f"no picture for {patience_s:g} s", reason="stalled")
        if silent_s >= 2 * patience_s:
            self._cancel(session, trouble, now_s)
            return 0.0
        if silent_s >= patience_s or (trouble.reason == "frozen" and session.complaint):
            self._stall(trouble, session.format)
            return 2 * patience_s - silent_s
        if session.has_delivered:
            self._run(session.format, now_s)
        return patience_s - silent_s

    def _run(self, opened: VideoFormat, now_s: float) -> None:
        self.quality.nominal_fps = opened.fps
        if self._running_since_s is None:
            self._running_since_s = now_s
            self.quality.first_frame_ms = round((now_s - self._started_at_s) * 1e3, 1)
        elif now_s - self._running_since_s > _HEALTHY_S:
            self._delays = self._fresh_delays()
        if (self.state.phase, self.state.format) != ("running", opened):
            self._enter(CameraState("running", format=opened))

    def _stall(self, trouble: SourceError, opened: VideoFormat) -> None:
        if self.state.phase != "stalled":
            self.quality.on_stall()
            self._enter(CameraState("stalled", trouble.reason, str(trouble), opened))

    def _cancel(self, session: Session, error: SourceError | None, now_s: float) -> None:
        session.cancel(error)
        self._retry_at_s = now_s + _GRACE_S

    def _await_end(self, session: Session, now_s: float) -> float:
        """A cancelled session has until `_retry_at_s` to come back; then it is left behind."""
        if now_s < self._retry_at_s:
            return self._retry_at_s - now_s
        self._session = None
        session.left_at_s = now_s
        self._abandoned.append(session)
        self.quality.abandoned += 1
        log.warning("camera.thread_left_behind", camera=self.name, hung=len(self._abandoned))
        self._after(session, now_s)
        return 0.0

    def _after(self, session: Session, now_s: float) -> None:
        """The session is over, or as good as; what now?"""
        if self._unwanted is not None:
            return
        error = session.error
        if self._running_since_s is not None and now_s - self._running_since_s > _HEALTHY_S:
            self._delays = self._fresh_delays()
        if error is None:  # cancelled, and wanted again
            self._retry_at_s = now_s
        elif isinstance(error, EndOfStream):
            self._unwanted = CameraState("disabled", error.reason, str(error))
        elif isinstance(error, SourceError):
            self._back_off(error, now_s)
        else:
            if self.trouble != "error":  # once is enough
                log.error("camera.bug", camera=self.name, exc_info=error)
            self._back_off(SourceError(f"{type(error).__name__}: {error}"), now_s)

    def _back_off(self, error: SourceError, now_s: float) -> None:
        self.quality.on_loss(error.reason)
        self._retry_at_s = now_s + next(self._delays)
        self._enter(CameraState("backoff", error.reason, str(error)))

    def _try_now(self) -> None:
        self._delays = self._fresh_delays()
        if self._session is None:
            self._retry_at_s = self._now()
        self._wake()

    def _patience_s(self, opened: VideoFormat) -> float:
        """How long a silence is still no stall: some cameras are slow by design."""
        return max(self.options.stall_timeout_s, 3 / opened.fps if opened.fps else 0.0)

    def _fresh_still(self) -> StillPicture:
        return StillPicture(self.options.frozen_timeout_s if self._is_live else 0.0)

    def _fresh_delays(self) -> Iterator[float]:
        return backoff(most_s=self.options.backoff_max_s)

    def _now(self) -> float:
        return self._clock_ns() / 1e9

    def _enter(self, state: CameraState) -> None:
        tell = log.info
        if self.state.phase == "running":
            self._ran_until_s = self._now()
        if state.phase in ("running", "disabled"):
            self.trouble = None
        elif state.phase in ("stalled", "backoff"):
            tell = log.debug if state.reason == self.trouble else log.warning  # a lasting trouble is told once
            self.trouble = state.reason
        elif state.phase == "connecting":
            tell = log.debug
        self.state = state
        tell(f"camera.{state.phase}", camera=self.name, **_facts(state))
        self._on_change(self)


def _all_hung() -> SourceError:
    return SourceError(
        f'{MAX_ABANDONED} reads never came back from the driver; isolation = "process" makes them killable',
        reason="stalled",
    )


def _facts(state: CameraState) -> dict[str, object]:
    facts: dict[str, object] = {}
    if state.message:
        facts |= {"reason": state.reason, "message": state.message}
    if state.format:
        facts |= {"width": state.format.width, "height": state.format.height, "fps": state.format.fps}
    return facts
