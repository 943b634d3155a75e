"""From candidate boxes to detections: thresholds by class, non-maximum suppression, source pixels.

What all detectors have in common, whatever their heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.config import Count, Share, Table
from edge_agent.data import Candidates, Detections
from edge_agent.errors import ModelError
from edge_agent.families import Thresholds
from edge_agent.geometry import Placement
from edge_agent.predictions import chosen

Floats = NDArray[np.float32]
BoxFormat = Literal["cxcywh", "xyxy", "xywh", "yxyx"]
BoxUnits = Literal["pixels", "normalized"]

LOG_LIMIT = 16.0
"""Of a size's logarithm; e^16 pixels are larger than any picture."""

MANY_CLASSES = 1000
"""Of models whose outputs do not say how many there are, and whose labels nobody gives."""

_CORNERS_OF = {
    "cxcywh": np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]], np.float32),
    "xywh": np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32),
    "yxyx": np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], np.float32),
}
_SIZED = np.array([[1, 0, -1, 0], [0, 1, 0, -1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)  # x1 y1 x2 y2 to x y w h


class BoxOptions(Table):
    """What every detector's `options` may say. `top_k`: candidates of a picture before NMS, the best by score."""

    nms: Literal["class", "agnostic", "none"] = "class"
    top_k: Count = 1000
    class_thresholds: dict[str, Share] = msgspec.field(default_factory=dict)


_total: Callable[..., Any] = np.add.reduce
_all: Callable[..., Any] = np.logical_and.reduce
"""As `sum` and `all` of arrays, at half the cost where there are few numbers."""


def corners_of(boxes: Floats, form: BoxFormat) -> Floats:
    """x1 y1 x2 y2 of boxes [N, 4] in another form."""
    if form == "xyxy":
        return boxes
    corners: Floats = boxes.dot(_CORNERS_OF[form])
    return corners


class Selection:
    """Which candidates are reported."""

    def __init__(self, options: BoxOptions, thresholds: Thresholds, labels: Sequence[str]) -> None:
        if not hasattr(cv2.dnn, "NMSBoxesBatched"):
            raise ModelError(f"OpenCV {cv2.__version__} is too old for batched NMS; 4.7 or newer is needed")
        self.nms = options.nms
        self._iou = thresholds.iou
        self._most = thresholds.max_detections
        self.threshold = thresholds.least
        self._by_class: Floats | None = None
        if options.class_thresholds:
            self._by_class = np.full(len(labels), thresholds.least, np.float32)
            for label, threshold in options.class_thresholds.items():
                if label not in labels:
                    raise ModelError(f"class_thresholds: there is no label {label!r}{plugins.nearest(label, labels)}")
                self._by_class[list(labels).index(label)] = threshold
            self.threshold = float(np.min(self._by_class))

    def keep(self, corners: Floats, scores: Floats, class_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """The places of those that stay, best first. Boxes and scores are finite."""
        if self._by_class is None:
            return self._suppressed(corners, scores, class_ids)
        wanted = self.wanted(scores, class_ids)
        return wanted[self._suppressed(corners[wanted], scores[wanted], class_ids[wanted])]

    def wanted(self, scores: Floats, class_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """The places of those that reach the threshold of their class."""
        least = np.float32(self.threshold) if self._by_class is None else self._by_class[class_ids]
        return np.flatnonzero(scores >= least)

    def _suppressed(self, corners: Floats, scores: Floats, class_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        if self.nms == "none" or len(scores) < 2:
            return np.argsort(-scores, kind="stable")[: self._most]
        together = class_ids if self.nms == "class" else np.zeros_like(class_ids)
        suppress: Callable[..., Any] = cv2.dnn.NMSBoxesBatched  # takes arrays too, but boxes sooner from lists
        kept = suppress(corners.dot(_SIZED).tolist(), scores, together.tolist(), 0.0, self._iou)  # best first
        return np.asarray(kept[: self._most], np.intp)


def decoded(
    found: Candidates,
    selection: Selection,
    placement: Placement,
    *,
    form: BoxFormat = "xyxy",
    scale: Floats | None = None,
) -> Detections:
    """Detections of candidates whose boxes are in input pixels, or in shares of the input where a `scale` is given."""
    boxes, scores, class_ids = found.boxes, found.scores, found.class_ids
    if (sound := finite(boxes, scores)) is not None:
        boxes, scores, class_ids = boxes[sound], scores[sound], class_ids[sound]
    if not len(scores):
        return nothing()
    corners = corners_of(boxes if scale is None else boxes * scale, form)
    order = selection.keep(corners, scores, class_ids)
    return detections(corners.take(order, 0), scores.take(order), class_ids.take(order), placement)


def finite(boxes: Floats, scores: Floats) -> NDArray[np.bool_] | None:
    """Which rows hold numbers alone; None where all do, told at little cost."""
    if math.isfinite(_total(boxes, None) + _total(scores)):
        return None
    sound: NDArray[np.bool_] = np.isfinite(boxes).all(1) & np.isfinite(scores)
    return sound


def detections(corners: Floats, scores: Floats, class_ids: NDArray[np.int64], placement: Placement) -> Detections:
    """Boxes in input pixels as detections in source pixels; what lies outside the picture is left out."""
    boxes = placement.to_source(corners)
    has_extent = boxes[:, 2:] > boxes[:, :2]
    if not _all(has_extent, None):
        seen = has_extent.all(1)
        boxes, scores, class_ids = boxes[seen], scores[seen], class_ids[seen]
    return Detections(boxes, scores, class_ids)


def visible(found: Detections) -> Detections:
    """Without the boxes that have no extent."""
    has_extent = found.boxes[:, 2:] > found.boxes[:, :2]
    if has_extent.all():
        return found
    return chosen(found, np.flatnonzero(has_extent.all(1)))


def nothing() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def sigmoid(values: NDArray[Any]) -> Floats:
    """1 / (1 + e^-x), for any x."""
    clipped: Floats = np.clip(values.astype(np.float32, copy=False), -80.0, 80.0)
    result: Floats = (1.0 / (1.0 + np.exp(-clipped))).astype(np.float32, copy=False)
    return result


def softmax(values: NDArray[Any], axis: int = -1) -> Floats:
    numbers = values.astype(np.float32, copy=False)
    powers = np.exp(numbers - numbers.max(axis, keepdims=True))
    result: Floats = (powers / powers.sum(axis, keepdims=True)).astype(np.float32, copy=False)
    return result
