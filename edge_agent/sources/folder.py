"""A folder of pictures, in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from edge_agent.config import CameraOptions
from edge_agent.sources._recording import Recording, RecordingOptions


class FolderOptions(RecordingOptions, kw_only=True):
    """`[cameras.<name>]` with `source = "folder"`."""


class FolderSource(Recording):
    """BMP, JPEG, PNG, TIFF and WebP files; one a second unless `fps` says otherwise."""

    Options: ClassVar[type[CameraOptions]] = FolderOptions

    def path_problems(self) -> Iterator[str]:
        if self._path.is_file():
            yield f'path: {self._path} is no folder; for a video, write source = "file"'
        yield from super().path_problems()


Source = FolderSource
