"""Face detectors of the YuNet kind: a box and five points a cell, three strides.

Outputs `cls_8`, `obj_8`, `bbox_8`, `kps_8`, and so for 16 and 32: [B, cells, 1, 1, 4, 10]. With s the stride:
score = √(cls · obj), centre = (cell + dx, dy) s, size = e^(dw, dh) s, points = (cell + dx, dy) s
(Wu, Peng, Yu, "YuNet: A Tiny Millisecond-level Face Detector", 2023; as OpenCV's FaceDetectorYN has it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import Candidates, Detections, ModelFacts, Names, Tensors
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import (
    LOG_LIMIT,
    BoxOptions,
    Floats,
    Selection,
    corners_of,
    finite,
    nothing,
    visible,
)
from edge_agent.families._keypoints import keypoint_names
from edge_agent.families._metadata import require_real
from edge_agent.families._pictures import BGR_0_255, picture_spec
from edge_agent.geometry import Placement

_PARTS = ("cls", "obj", "bbox", "kps")
_POINTS = ["right_eye", "left_eye", "nose", "right_mouth_corner", "left_mouth_corner"]


class YuNetOptions(BoxOptions):
    """`[models.<name>.options]` of a YuNet model."""

    keypoints: list[str] | None = None
    skeleton: list[tuple[int, int]] | None = None


class YuNetFamily:
    """Faces: boxes with five points."""

    Options: ClassVar[type[Table]] = YuNetOptions
    takes_batches = True
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        strides = _strides(facts)
        return Guess(3, [f"outputs cls, obj, bbox and kps of strides {strides} are YuNet's"]) if strides else None

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, YuNetOptions)
        self._strides = _strides(meaning.facts)
        if not self._strides:
            raise ModelError("a YuNet model has the outputs cls_8, obj_8, bbox_8, kps_8, and so for other strides")
        require_real(meaning.facts, *(spec.name for spec in meaning.facts.outputs))
        self.preprocess = picture_spec(meaning, **BGR_0_255, pad=0, anchor="top-left")
        labels = meaning.labels if meaning.labels is not None else ["face"]
        if len(labels) != 1:
            raise ModelError(f"the entry names {len(labels)} labels, a YuNet model has one class")
        given = options.keypoints or _POINTS
        points, skeleton = keypoint_names(given, options.skeleton, meaning.facts, len(_POINTS))
        self.names = Names(tuple(labels), points, skeleton)
        self._selection = Selection(options, meaning.thresholds, self.names.labels)
        self._most = options.top_k

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        count = len(outputs[f"cls_{self._strides[0]}"])
        return [self._reduce({name: value[index] for name, value in outputs.items()}) for index in range(count)]

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        boxes, scores, points = candidates.boxes, candidates.scores, candidates.extras
        assert points is not None
        if (sound := finite(boxes, scores)) is not None:
            boxes, scores, points = boxes[sound], scores[sound], points[sound]
        if not len(scores):
            return nothing()
        corners, class_ids = corners_of(boxes, "cxcywh"), np.zeros(len(scores), np.int64)
        order = self._selection.keep(corners, scores, class_ids)
        keypoints = np.ones((len(order), len(_POINTS), 3), np.float32)
        keypoints[..., :2] = placement.to_source(np.nan_to_num(points[order]).reshape(-1, len(_POINTS), 2))
        keypoints[..., 2] = scores[order, None]
        boxes = placement.to_source(corners[order])
        return visible(Detections(boxes, scores[order], class_ids[order], keypoints=keypoints))

    def _reduce(self, picture: Tensors) -> Candidates:
        parts = [self._level(picture, stride) for stride in self._strides]
        boxes, scores, points = (np.concatenate(values) for values in zip(*parts, strict=True))
        best = np.argsort(-scores, kind="stable")[: self._most]
        return Candidates(best, boxes[best], scores[best], np.zeros(len(best), np.int64), points[best])

    def _level(self, picture: Tensors, stride: int) -> tuple[Floats, Floats, Floats]:
        rows, columns = self.preprocess.height // stride, self.preprocess.width // stride
        certain, there, boxes, points = (self._part(picture, part, stride, rows * columns) for part in _PARTS)
        with np.errstate(invalid="ignore", over="ignore"):
            scores = np.sqrt(np.clip(certain[:, 0], 0, 1) * np.clip(there[:, 0], 0, 1))
            cells = np.flatnonzero(scores >= np.float32(self._selection.threshold))
            at = np.stack((cells % columns, cells // columns), 1).astype(np.float32)
            centers = (at + boxes[cells, :2]) * stride
            sizes = np.exp(np.clip(boxes[cells, 2:4], -LOG_LIMIT, LOG_LIMIT)) * stride
            placed = (points[cells].reshape(len(cells), len(_POINTS), 2) + at[:, None]) * stride
        return np.concatenate((centers, sizes), 1), scores[cells], placed.reshape(len(cells), 2 * len(_POINTS))

    def _part(self, picture: Tensors, part: str, stride: int, cells: int) -> Floats:
        values: NDArray[Any] = picture[f"{part}_{stride}"]
        if len(values) != cells:
            raise EngineError(f"{part}_{stride}: the model gave {len(values)} cells, the input makes {cells}")
        return values.reshape(cells, -1).astype(np.float32, copy=False)


Family = YuNetFamily


def _strides(facts: ModelFacts) -> list[int]:
    """The strides for which all parts are there."""
    names = {spec.name for spec in facts.outputs}
    found = {int(match[1]) for name in names if (match := re.fullmatch(r"cls_(\d+)", name))}
    return sorted(stride for stride in found if all(f"{part}_{stride}" in names for part in _PARTS))
