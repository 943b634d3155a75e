"""A folder of pictures, read in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from edge_agent.data import Image, VideoFormat
from edge_agent.errors import SourceError

log = structlog.get_logger()

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Pictures:
    """The pictures of a folder that OpenCV can read, once through."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left = _readable(folder)
        self._image: Image | None = None

    def format(self) -> VideoFormat:
        """The size of the first; raises `SourceError` if there is none that can be read."""
        first = next(_readable(self._folder), None)
        if first is None:
            raise SourceError(f"{self._folder} holds no picture that OpenCV can read", reason="unsupported")
        return VideoFormat(width=first.shape[1], height=first.shape[0])

    def grab(self) -> bool:
        """Go to the next picture; False after the last."""
        self._image = next(self._left, None)
        return self._image is not None

    def retrieve(self, into: Image) -> Image | None:
        """The picture, [height, width, 3] BGR; `into` is not used."""
        return self._image

    def close(self) -> None:
        self._image = None


def problems(folder: Path) -> Iterator[str]:
    """A sentence if there is nothing to read. Raises `OSError` where the folder cannot be read."""
    if not listing(folder):
        yield f"path: the folder {folder} holds no picture ({', '.join(SUFFIXES)})"


def listing(folder: Path) -> Sequence[Path]:
    """The paths of its pictures, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read(path: Path) -> Image | None:
    """One picture, [height, width, 3] BGR; None, and a line in the log, if OpenCV cannot read it."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        log.warning("file.skipped", path=str(path), reason="no picture that OpenCV can read")
    return image  # type: ignore[return-value]


def _readable(folder: Path) -> Iterator[Image]:
    for path in listing(folder):
        if (image := read(path)) is not None:
            yield image
