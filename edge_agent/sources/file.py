"""Pictures from disk: a video, or a folder of pictures."""

from __future__ import annotations

from typing import ClassVar

from edge_agent.config import CameraOptions
from edge_agent.sources._recording import Recording, RecordingOptions


class FileOptions(RecordingOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "file"`."""


class FileSource(Recording):
    """A video file that OpenCV's FFmpeg can read; a folder is played as the source `folder` does."""

    Options: ClassVar[type[CameraOptions]] = FileOptions


Source = FileSource
