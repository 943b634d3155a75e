"""Pictures from disk: a video, or a folder of pictures in the order of their names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import structlog

from edge_agent.config import CameraOptions, ConfigPath, Positive
from edge_agent.data import Captured, Image, VideoFormat
from edge_agent.errors import EndOfStream, SourceError
from edge_agent.sources import PaceName, _opencv
from edge_agent.sources._pace import Pace

log = structlog.get_logger()

_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_FOLDER_FPS = 1.0


class FileOptions(CameraOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "file"`."""

    path: ConfigPath
    loop: bool = False
    pace: PaceName = "realtime"
    fps: Positive | None = None


class FileSource:
    """Every picture once (or again and again, with `loop`), at the file's own pace or as fast as it is read."""

    Options: ClassVar[type[CameraOptions]] = FileOptions
    is_live = False  # a file waits to be read; no frame of it need ever be dropped

    def __init__(self, options: FileOptions) -> None:
        self._options = options
        self._path = Path(options.path)
        self._video: _opencv.Capture | None = None
        self._pictures: Iterator[Path] = iter(())
        self._pace: Pace | None = None

    def check(self) -> Sequence[str]:
        return [*_opencv.problems("the source 'file'"), *self._path_problems()]

    def open(self) -> VideoFormat:
        for problem in self.check():
            raise SourceError(problem, reason="not_found")
        opened = self._open_folder() if self._path.is_dir() else self._open_video()
        fps = self._options.fps or opened.fps or _FOLDER_FPS
        is_paced = self._options.pace == "realtime"
        self._pace = Pace(fps) if is_paced else None
        return VideoFormat(opened.width, opened.height, fps if is_paced else None)

    def read(self, into: Image) -> Captured | None:
        if self._pace and not self._pace.is_due():
            return None
        captured = self._next(into)
        if captured is None and self._options.loop:
            self._rewind()
            captured = self._next(into)
            if captured is None:
                raise SourceError(f"{self._path} holds no picture that can be read", reason="unsupported")
        if captured is None:
            raise EndOfStream(f"{self._path} has ended; set loop = true to start it again")
        return captured

    def close(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None

    def _open_video(self) -> VideoFormat:
        self._video = _opencv.Capture.open(str(self._path), "CAP_FFMPEG", {})
        if self._video is None:
            raise SourceError(f"{self._path} is no video that OpenCV can read", reason="unsupported")
        return self._video.format()

    def _open_folder(self) -> VideoFormat:
        self._pictures = iter(self._listing())
        first = next((image for image in map(_picture, self._listing()) if image is not None), None)
        if first is None:
            raise SourceError(f"{self._path} holds no picture that OpenCV can read", reason="unsupported")
        return VideoFormat(width=first.shape[1], height=first.shape[0])

    def _rewind(self) -> None:
        if self._video is None:
            self._pictures = iter(self._listing())
        else:
            self._video.close()
            self._open_video()

    def _next(self, into: Image) -> Captured | None:
        if self._video is not None:
            return self._video.read(into)
        image = next((image for image in map(_picture, self._pictures) if image is not None), None)
        return None if image is None else Captured(image=image, captured_at_ns=time.time_ns())

    def _path_problems(self) -> Iterator[str]:
        try:
            if self._path.is_dir() and not self._listing():
                yield f"path: the folder {self._path} holds no picture ({', '.join(sorted(_PICTURES))})"
            elif not os.access(self._path, os.R_OK):
                self._path.stat()
                yield f"path: {self._path} may not be read by this user"
        except OSError as error:
            yield f"path: {self._path}: {error.strerror}"

    def _listing(self) -> Sequence[Path]:
        return sorted(path for path in self._path.iterdir() if path.suffix.lower() in _PICTURES)


Source = FileSource


def _picture(path: Path) -> Image | None:
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        log.warning("file.skipped", path=str(path), reason="no picture that OpenCV can read")
    return image  # type: ignore[return-value]
