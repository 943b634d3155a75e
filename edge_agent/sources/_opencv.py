"""`cv2.VideoCapture` as our sources need it: opened with bounds, read into buffers of ours."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edge_agent import plugins
from edge_agent.data import Captured, Image, VideoFormat
from edge_agent.errors import SourceError

if TYPE_CHECKING:
    import cv2

_FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"  # OpenCV's only way to reach FFmpeg's own options
_environment = threading.Lock()


def problems(needed_by: str) -> Sequence[str]:
    """A sentence if OpenCV is not installed."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        return [plugins.missing(error, needed_by=needed_by)]
    return []


class Capture:
    """An open `cv2.VideoCapture` and how it is read."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture

    @classmethod
    def open(
        cls, target: str, api: str, parameters: Mapping[str, float], *, ffmpeg_options: str = ""
    ) -> Capture | None:
        """A capture of `target` by the API `cv2.<api>`, with `cv2.<name>: value` parameters, or None."""
        for problem in problems("this source"):
            raise SourceError(problem, reason="unsupported")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # failures are told by us, once
        import cv2

        _quieten()
        flat = [int(number) for name, value in parameters.items() for number in (getattr(cv2, name), value)]
        with _environment:
            before = os.environ.get(_FFMPEG_OPTIONS)
            if ffmpeg_options:
                os.environ[_FFMPEG_OPTIONS] = ffmpeg_options
            try:
                capture = cv2.VideoCapture(target, getattr(cv2, api), flat)
            finally:
                if ffmpeg_options:
                    _restore(_FFMPEG_OPTIONS, before)
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

    def read(self, into: Image) -> Captured | None:
        """The next picture, in `into` if its shape fits; None at the end or on a failure."""
        ok, image = self._capture.read(into)
        if not ok:
            return None
        return Captured(image=image, captured_at_ns=time.time_ns())  # type: ignore[arg-type]

    def close(self) -> None:
        self._capture.release()


def _quieten() -> None:
    """Keep OpenCV's own warnings off stderr; the function moved between its versions."""
    import cv2

    set_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
    set_level(2)  # errors only


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
