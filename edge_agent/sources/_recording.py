"""What sources that play recordings have in common: pace, looping, and an end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_agent.config import CameraOptions, ConfigPath, Positive
from edge_agent.data import Image, VideoFormat
from edge_agent.errors import EndOfStream, SourceError
from edge_agent.sources import PaceName, _opencv, _pictures
from edge_agent.sources._pace import Pace
from edge_agent.sources._pictures import Pictures

_FOLDER_FPS = 1.0


class RecordingOptions(CameraOptions, kw_only=True):
    """Where a recording lies and how it is played."""

    path: ConfigPath
    loop: bool = False
    pace: PaceName = "realtime"
    fps: Positive | None = None


class Recording:
    """Every picture once (or again and again, with `loop`), at the recording's own pace or as fast as it is read."""

    is_live = False  # a recording waits to be read; no frame of it need ever be dropped

    def __init__(self, options: RecordingOptions) -> None:
        self._options = options
        self._path = Path(options.path)
        self._reader: _opencv.Capture | Pictures | None = None
        self._pace: Pace | None = None

    def check(self) -> Sequence[str]:
        return [*_opencv.problems(f"the source {self._options.source!r}"), *self.path_problems()]

    def open(self) -> VideoFormat:
        for problem in _opencv.problems(f"the source {self._options.source!r}"):
            raise SourceError(problem, reason="unsupported")
        for problem in self.path_problems():
            raise SourceError(problem, reason="not_found")
        self._reader = _open(self._path)
        opened = self._reader.format()
        fps = self._options.fps or opened.fps or _FOLDER_FPS
        is_paced = self._options.pace == "realtime"
        self._pace = Pace(fps) if is_paced else None
        return VideoFormat(opened.width, opened.height, fps if is_paced else None)

    def grab(self) -> int | None:
        assert self._reader is not None, "open() comes first"
        if self._pace and not self._pace.is_due():
            return None
        if not self._reader.grab():
            self._rewind()
        return time.monotonic_ns()

    def retrieve(self, into: Image) -> Image | None:
        assert self._reader is not None, "grab() comes first"
        return self._reader.retrieve(into)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _rewind(self) -> None:
        """Grab the first picture again. Raises `EndOfStream` where the file is not to loop."""
        if not self._options.loop:
            raise EndOfStream(f"{self._path} has ended; set loop = true to start it again")
        self.close()
        self._reader = _open(self._path)
        if not self._reader.grab():
            raise SourceError(f"{self._path} holds no picture that can be read", reason="unsupported")

    def path_problems(self) -> Iterator[str]:
        try:
            if self._path.is_dir():
                yield from _pictures.problems(self._path)
            elif not os.access(self._path, os.R_OK):
                self._path.stat()
                yield f"path: {self._path} may not be read by this user"
        except OSError as error:
            yield f"path: {self._path}: {error.strerror}"


def _open(path: Path) -> _opencv.Capture | Pictures:
    if path.is_dir():
        return Pictures(path)
    video = _opencv.Capture.open(str(path), "CAP_FFMPEG", {})
    if video is None:
        raise SourceError(f"{path} is no video that OpenCV can read", reason="unsupported")
    return video
