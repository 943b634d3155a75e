"""`cv2.VideoCapture` as our sources need it: opened with bounds, read into buffers of ours."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_agent import plugins
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError

if TYPE_CHECKING:
    import cv2

_FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"  # OpenCV's only way to reach FFmpeg's own options


def problems(needed_by: str) -> Sequence[str]:
    """A sentence if OpenCV is not installed."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        return [plugins.missing(error, needed_by=needed_by)]
    return []


def verifies_tls() -> bool:
    """Whether this OpenCV's FFmpeg heeds `tls_verify` for RTSP as well; it does from 4.13 on."""
    import cv2

    return tuple(int(part) for part in cv2.__version__.split(".")[:2]) >= (4, 13)


def has_gstreamer() -> bool:
    """Whether this OpenCV was built with GStreamer."""
    import cv2

    return cv2.CAP_GSTREAMER in cv2.videoio_registry.getBackends()


class Capture:
    """An open `cv2.VideoCapture` and how it is read."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture

    @classmethod
    def open(
        cls,
        target: str,
        api: str,
        parameters: Mapping[str, float],
        *,
        ffmpeg_options: str = "",
        timeout_s: float = 10.0,
    ) -> Capture | None:
        """A capture of `target` by the API `cv2.<api>`, with `cv2.<name>: value` parameters, or None.

        `timeout_s` bounds the wait for other streams that are opened with other FFmpeg options.
        """
        for problem in problems("this source"):
            raise SourceError(problem, reason="unsupported")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # failures are told by us, once
        import cv2

        _quieten()
        flat = [int(number) for name, value in parameters.items() for number in (getattr(cv2, name), value)]
        with _options_in_environment(ffmpeg_options, timeout_s):
            capture = cv2.VideoCapture(target, getattr(cv2, api), flat)
        if not capture.isOpened():
            capture.release()
            return None
        return cls(capture)

    def format(self) -> VideoFormat:
        """What the stream says of itself."""
        import cv2

        fps = self._capture.get(cv2.CAP_PROP_FPS)
        return VideoFormat(
            width=int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            height=int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            fps=fps if 0 < fps < 1000 else None,
        )

    def grab(self) -> bool:
        """Take the next picture off the stream; False at the end or on a failure."""
        return self._capture.grab()

    def stream_s(self) -> float | None:
        """The grabbed picture's time by the stream's own clock, in seconds; None where it has none."""
        import cv2

        milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        return milliseconds / 1e3 if milliseconds > 0 else None

    def retrieve(self, into: Image) -> Image | None:
        """The grabbed picture, in `into` if its shape fits; None if it cannot be had."""
        ok, image = self._capture.retrieve(into)
        return image if ok else None  # type: ignore[return-value]

    def close(self) -> None:
        self._capture.release()


def _quieten() -> None:
    """Keep OpenCV's own warnings off stderr; the function moved between its versions."""
    import cv2

    set_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
    set_level(2)  # errors only


def environment() -> dict[str, str]:
    """A copy of the environment, without what is in it for a stream that is being opened."""
    return _options_in_environment.environment()


class _OptionsInEnvironment:
    """The variable holds what whoever opens a stream wants; those who want the same may open at a time, so that
    one camera that takes long to open does not keep its likes waiting. Others wait their turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._value = ""
        self._users = 0
        self._before: str | None = None

    @contextmanager
    def __call__(self, value: str, timeout_s: float) -> Iterator[None]:
        if not value:
            yield
            return
        self._enter(value, timeout_s)
        try:
            yield
        finally:
            self._leave()

    def environment(self) -> dict[str, str]:
        with self._changed:
            copied = dict(os.environ)
            if self._users:
                copied.pop(_FFMPEG_OPTIONS, None)
            return copied

    def _enter(self, value: str, timeout_s: float) -> None:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            is_my_turn = self._changed.wait_for(
                lambda: self._waiting[0] is turn and (not self._users or self._value == value), timeout_s
            )
            self._waiting.remove(turn)
            self._changed.notify_all()
            if not is_my_turn:
                raise SourceError("other cameras, with other options, take too long to open", reason="timeout")
            if not self._users:
                self._before = os.environ.get(_FFMPEG_OPTIONS)
            self._users, self._value = self._users + 1, value
            os.environ[_FFMPEG_OPTIONS] = value

    def _leave(self) -> None:
        with self._changed:
            self._users -= 1
            if not self._users:
                _restore(_FFMPEG_OPTIONS, self._before)
            self._changed.notify_all()


_options_in_environment = _OptionsInEnvironment()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
