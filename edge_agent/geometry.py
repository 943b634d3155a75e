"""Where a source picture lies in a model's input, and the way back. Pure arithmetic.

Coordinates are continuous: pixel (column 0, row 0) covers 0..1, its centre is at (0.5, 0.5); this is
what `cv2.resize` with linear sampling does too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.data import PreprocessSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """The rectangle of a model's input that shows the source picture.

    `left`, `top`, `width`, `height` are whole pixels of the input; a cropped picture has a negative
    `left` or `top`. The scales are exact for that rectangle, so that nothing is lost to its rounding.
    """

    source_width: int
    source_height: int
    left: int
    top: int
    width: int
    height: int
    _scale: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    _offset: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    _bounds: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, pair in (
            ("_scale", (self.scale_x, self.scale_y)),
            ("_offset", (self.left, self.top)),
            ("_bounds", (self.source_width, self.source_height)),
        ):
            object.__setattr__(self, name, np.array(pair * 2, np.float32))  # as of boxes, whose first half is a point

    @property
    def scale_x(self) -> float:
        return self.width / self.source_width

    @property
    def scale_y(self) -> float:
        return self.height / self.source_height

    def to_input(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Points [..., 2] (or boxes [..., 4]) from source pixels to input pixels."""
        size = points.shape[-1]
        moved: NDArray[np.float32] = points * self._scale[:size] + self._offset[:size]
        return moved

    def to_source(self, points: NDArray[np.float32], *, inside: bool = True) -> NDArray[np.float32]:
        """Points [..., 2] (or boxes [..., 4]) from input pixels to source pixels, kept `inside` the picture."""
        offset, scale, bounds = self._offset, self._scale, self._bounds
        if points.shape[-1] == 2:
            offset, scale, bounds = offset[:2], scale[:2], bounds[:2]
        moved: NDArray[np.float32] = points - offset
        moved /= scale
        if inside:
            np.maximum(moved, 0, out=moved)
            np.minimum(moved, bounds, out=moved)
        return moved


@lru_cache(maxsize=64)
def place(source_width: int, source_height: int, spec: PreprocessSpec) -> Placement:
    """Where a picture of this size goes in the input that `spec` describes."""
    if spec.resize == "stretch":
        return Placement(source_width, source_height, 0, 0, spec.width, spec.height)
    ratios = spec.width / source_width, spec.height / source_height
    ratio = min(ratios) if spec.resize == "letterbox" else max(ratios)
    width, height = max(1, round(source_width * ratio)), max(1, round(source_height * ratio))
    if spec.anchor == "top-left":
        return Placement(source_width, source_height, 0, 0, width, height)
    left, top = (spec.width - width) // 2, (spec.height - height) // 2
    return Placement(source_width, source_height, left, top, width, height)


def iou(ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """[N, M]: intersection over union of boxes [N, 4] and [M, 4], x1 y1 x2 y2."""
    left, right = ones.astype(np.float64)[:, None], others.astype(np.float64)[None]
    low, high = np.maximum(left[..., :2], right[..., :2]), np.minimum(left[..., 2:], right[..., 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (left, right)]
    ratio: NDArray[np.float64] = common / np.maximum(areas[0] + areas[1] - common, 1e-9)
    return ratio
