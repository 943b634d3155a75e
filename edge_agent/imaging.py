"""What the CPU does to pictures with OpenCV: fit them to a model's input, pack them as JPEG.

Imported only by those who have pictures to work on, since importing OpenCV is slow.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.data import Image, PreprocessSpec
from edge_agent.geometry import Placement, place


class Preprocessor:
    """Turns pictures of any size into a model's input, reusing its own canvas.

    One instance serves one thread. The result agrees with `PreprocessSpec`'s formula.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        self.spec = spec
        self._canvas = np.full((spec.height, spec.width, 3), spec.pad, np.uint8)
        self._placement: Placement | None = None
        self._planes = [np.empty((spec.height, spec.width), np.uint8) for _ in range(3)]
        self._scale = np.array(spec.scale, np.float32) / np.array(spec.std, np.float32)
        self._shift = np.array(spec.mean, np.float32) / np.array(spec.std, np.float32)
        is_whole = np.dtype(spec.dtype).kind in "iu"
        self._identity = is_whole or (bool(np.all(self._scale == 1)) and not self._shift.any())

    def __call__(self, image: Image, out: NDArray[Any]) -> Placement:
        """Write `image` ([h, w, 3] uint8 BGR) into `out` ([3, H, W] or [H, W, 3], the spec's dtype)."""
        placement = place(image.shape[1], image.shape[0], self.spec)
        self._fit(image, placement)
        if self.spec.layout == "nhwc":
            self._write_interleaved(out)
        else:
            self._write_planes(out)
        return placement

    def _fit(self, image: Image, at: Placement) -> None:
        if at != self._placement:
            self._canvas[:] = self.spec.pad
            self._placement = at
        if at.width > self.spec.width or at.height > self.spec.height:  # cropped, at least on one side
            whole = cv2.resize(image, (at.width, at.height), interpolation=cv2.INTER_LINEAR)
            top, left = max(0, -at.top), max(0, -at.left)
            np.copyto(self._canvas, whole[top : top + self.spec.height, left : left + self.spec.width])
            return
        target = self._canvas[at.top : at.top + at.height, at.left : at.left + at.width]
        if target.shape == image.shape:
            np.copyto(target, image)
        else:
            cv2.resize(image, (at.width, at.height), dst=target, interpolation=cv2.INTER_LINEAR)

    def _write_planes(self, out: NDArray[Any]) -> None:
        cv2.split(self._canvas, self._planes)
        planes = self._planes[::-1] if self.spec.color == "rgb" else self._planes
        for plane, target, scale, shift in zip(planes, out, self._scale, self._shift, strict=True):
            if self._identity:
                np.copyto(target, plane, casting="unsafe")
                continue
            np.multiply(plane, scale, out=target, dtype=np.float32, casting="unsafe")
            if shift:
                np.subtract(target, shift, out=target)

    def _write_interleaved(self, out: NDArray[Any]) -> None:
        ordered = cv2.cvtColor(self._canvas, cv2.COLOR_BGR2RGB) if self.spec.color == "rgb" else self._canvas
        if self._identity:
            np.copyto(out, ordered, casting="unsafe")
        else:
            out[...] = ordered * self._scale - self._shift


def encode_jpeg(image: Image, *, quality: int = 85) -> bytes:
    """The picture as JPEG."""
    ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"OpenCV could not encode a picture of shape {image.shape} as JPEG")
    return data.tobytes()


def halved(image: Image) -> Image:
    """The picture at half its width and height."""
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
