"""Raw pictures as cameras and pipelines hand them over, turned into BGR in a buffer of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_agent.data import Image

Raw: TypeAlias = NDArray[np.uint8]

FORMATS = ("BGR3", "BGRx", "YUYV", "UYVY", "NV12", "NV21", "YU12", "RGB3", "MJPG", "JPEG", "GREY")
"""Four-letter codes of what can be turned, the cheapest first; GREY is last since it has no colour."""


def to_bgr(format: str, raw: Raw, width: int, height: int, stride: int, into: Image) -> Image | None:
    """`raw` (1-D, uint8) as [height, width, 3] BGR, in `into` where its shape fits; None if it is damaged.

    `stride` is the bytes from one row to the next, of the first plane; 0 where rows follow each other.
    """
    import cv2

    if not raw.size:
        return None
    if format in ("MJPG", "JPEG"):
        return cv2.imdecode(raw, cv2.IMREAD_COLOR)  # type: ignore[return-value]
    channels, rows, code_name = _LAYOUTS[format]
    row_bytes = width * channels
    stride = stride or row_bytes
    needed = stride * rows(height)
    if raw.size < needed:
        return None
    lines = raw[:needed].reshape(rows(height), stride)[:, :row_bytes]
    picture = np.ascontiguousarray(lines).reshape(rows(height), width, channels)
    if into.shape != (height, width, 3):
        into = np.empty((height, width, 3), np.uint8)
    if code_name is None:
        np.copyto(into, picture)
        return into
    cv2.cvtColor(picture, getattr(cv2, code_name), dst=into)
    return into


def _all(height: int) -> int:
    return height


def _planar(height: int) -> int:
    """4:2:0: a plane of brightness, and half as much of colour."""
    return height * 3 // 2


_LAYOUTS: dict[str, tuple[int, Callable[[int], int], Any]] = {  # bytes a pixel, rows, OpenCV's conversion
    "BGR3": (3, _all, None),
    "BGRx": (4, _all, "COLOR_BGRA2BGR"),
    "RGB3": (3, _all, "COLOR_RGB2BGR"),
    "YUYV": (2, _all, "COLOR_YUV2BGR_YUYV"),
    "UYVY": (2, _all, "COLOR_YUV2BGR_UYVY"),
    "NV12": (1, _planar, "COLOR_YUV2BGR_NV12"),
    "NV21": (1, _planar, "COLOR_YUV2BGR_NV21"),
    "YU12": (1, _planar, "COLOR_YUV2BGR_I420"),
    "GREY": (1, _all, "COLOR_GRAY2BGR"),
}
