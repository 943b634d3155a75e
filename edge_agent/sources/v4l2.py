"""USB and other local cameras by V4L2, through OpenCV."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from edge_agent.config import CameraOptions, Count, Positive
from edge_agent.data import Captured, Image, VideoFormat
from edge_agent.errors import SourceError
from edge_agent.sources import _opencv


class V4l2Options(CameraOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "v4l2"`; what is None is left to the driver."""

    device: str = "/dev/video0"
    format: Annotated[str, Meta(pattern=r"^[A-Z0-9]{4}$")] | None = None
    width: Count | None = None
    height: Count | None = None
    fps: Positive | None = None


class V4l2Source:
    """A device by path (`/dev/video0`, or a lasting name such as `/dev/v4l/by-id/…`)."""

    Options: ClassVar[type[CameraOptions]] = V4l2Options
    is_live = True

    def __init__(self, options: V4l2Options) -> None:
        self._options = options
        self._capture: _opencv.Capture | None = None

    def check(self) -> Sequence[str]:
        problem = self._device_problem()
        return [*_opencv.problems("the source 'v4l2'"), *([str(problem)] if problem else [])]

    def open(self) -> VideoFormat:
        if problem := self._device_problem():
            raise problem
        o = self._options
        wishes: dict[str, float] = {}
        if o.format:
            wishes["CAP_PROP_FOURCC"] = int.from_bytes(o.format.encode(), "little")
        for name, value in (("FRAME_WIDTH", o.width), ("FRAME_HEIGHT", o.height), ("FPS", o.fps)):
            if value:
                wishes[f"CAP_PROP_{name}"] = value
        self._capture = _opencv.Capture.open(o.device, "CAP_V4L2", wishes)
        if self._capture is None:
            raise SourceError(
                f"{o.device} does not open as a camera; is another program using it?", reason="device_busy"
            )
        return self._capture.format()

    def read(self, into: Image) -> Captured | None:
        assert self._capture is not None, "open() comes first"
        captured = self._capture.read(into)
        if captured is None:
            raise SourceError(f"{self._options.device} stopped delivering", reason="disconnected")
        return captured

    def close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _device_problem(self) -> SourceError | None:
        device = self._options.device
        try:
            kind = Path(device).stat().st_mode
        except OSError as error:
            return SourceError(f"device: {device}: {error.strerror}", reason="device_not_found")
        if not stat.S_ISCHR(kind):
            return SourceError(f"device: {device} is no device", reason="device_not_found")
        if not os.access(device, os.R_OK | os.W_OK):
            return SourceError(
                f"device: {device} may not be opened; add this user to the group 'video'", reason="error"
            )
        return None


Source = V4l2Source
