"""YOLO models whose boxes come in one tensor: detection, instance segmentation, pose and oriented boxes.

Heads, told apart by `options.head` or by shape; N cells, C classes, E extras (mask coefficients, keypoints, an angle):
- `dense` [B, 4 + C + E, N], or its transpose: cx cy w h in input pixels, then one probability a class (YOLOv8, v9,
  11, 12 as exported by their makers, and the bundled models).
- `objectness` [B, N, 5 + C + E]: cx cy w h in input pixels, objectness, one probability a class (YOLOv5, v7).
- `yolox` [B, N, 5 + C]: dx, dy, log w, log h in grid units, objectness, one probability a class
  (Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430), strides 8, 16 and 32.
- `end_to_end` [B, N, 6 + E]: x1 y1 x2 y2 in input pixels, score, class: no NMS is needed (YOLOv10, YOLO26).
- `queries` [B, N, 4 + C]: cx cy w h in shares of the input, then one probability a class; no NMS is needed (RT-DETR as
  Ultralytics exports it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import (
    Candidates,
    Detections,
    ModelFacts,
    Names,
    Poses,
    PreprocessSpec,
    Reduction,
    Tensors,
)
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning, _dense
from edge_agent.families._boxes import (
    LOG_LIMIT,
    BoxFormat,
    Floats,
    Selection,
    corners_of,
    detections,
    finite,
    nothing,
    visible,
)
from edge_agent.families._keypoints import keypoint_names, no_poses, posed
from edge_agent.families._masks import masks_of
from edge_agent.families._metadata import labels_of, require_real
from edge_agent.families._oriented import fast_nms, turned_corners
from edge_agent.families._pictures import BGR_0_255, RGB_0_1, picture_spec, shown
from edge_agent.families._yolo_head import (
    ANCHORS,
    STRIDES,
    YoloHead,
    YoloOptions,
    cells_of,
    read_head,
    shape_of,
    told_task,
)
from edge_agent.geometry import Placement


@dataclass(frozen=True, slots=True)
class _Segmented:
    """The candidates of a picture, and the masks that theirs are mixed of: [M, h, w]."""

    found: Candidates
    prototypes: Floats


class YoloFamily:
    """Boxes with classes and scores; with masks, keypoints or corners, by the task."""

    Options: ClassVar[type[Table]] = YoloOptions
    takes_batches = True

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            head = read_head(facts, YoloOptions(), None)
        except ModelError:
            return None
        told = told_task(facts) is not None
        because = [f"the output {head.output!r} {shown(shape_of(facts, head.output))} is {_PROSE[head.kind]}"]
        if told:
            because.append(f"the file says its task is {facts.metadata['task']!r}")
        elif head.task == "segment":
            because.append(f"{head.prototypes!r} holds the prototypes of masks")
        elif head.task == "pose":
            because.append("56 rows without labels are one class and 17 keypoints")
        certain = told or head.kind == "objectness" or (head.kind == "end_to_end" and head.extras == 0)
        shape = shape_of(facts, head.output)
        cells = cells_of(facts, YoloOptions())
        fits = head.kind in ("end_to_end", "queries") or not cells or any(side in shape for side in cells)
        if not (told or fits or any(ANCHORS * side in shape for side in cells)):
            return None  # a map, perhaps, that is wider than high
        certain = certain or any(side in shape[1:] for side in cells)
        return Guess(3 if told else 2 if certain else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, YoloOptions)
        self._head = head = read_head(meaning.facts, options, meaning.labels)
        require_real(meaning.facts, head.output, head.prototypes or "")
        self.task: str = head.task
        defaults = BGR_0_255 | {"anchor": "top-left"} if head.kind == "yolox" else RGB_0_1
        if head.kind == "queries":
            defaults = {"resize": "stretch", **defaults}
        self.preprocess = picture_spec(meaning, **defaults)
        self.names = _names(meaning, options, head)
        if head.kind in ("end_to_end", "queries"):  # these have chosen already
            options = msgspec.structs.replace(options, nms="none")
        self._selection = Selection(options, meaning.thresholds, self.names.labels)
        self._form, self._scale = _boxes_form(options, head, self.preprocess)
        self._ends_there = head.kind == "end_to_end"
        self._grid = None
        if head.kind == "yolox":
            self._grid = _grid(self.preprocess, options, shape_of(meaning.facts, head.output)[1])
        cells = len(self._grid.strides) if self._grid else None
        self._reduction = Reduction(
            output=head.output,
            rows_first=head.rows_first,
            has_objectness=head.has_objectness,
            threshold=self._selection.threshold,
            max_candidates=options.top_k,
            cells=cells,
            classes=head.classes if head.extras else None,
        )
        self._most = meaning.thresholds.max_detections
        self._iou = meaning.thresholds.iou

    @property
    def reduction(self) -> Reduction | None:
        return None if self._ends_there or self._head.extras else self._reduction

    def reduce(self, outputs: Tensors) -> Sequence[Any]:
        raw = outputs[self._head.output]
        found = [self._ended(picture) for picture in raw] if self._ends_there else _dense.reduce(raw, self._reduction)
        if self._head.prototypes is None:
            return found
        prototypes = outputs[self._head.prototypes].astype(np.float32, copy=False)
        return [_Segmented(one, masks) for one, masks in zip(found, prototypes, strict=True)]

    def decode(self, candidates: Any, placement: Placement) -> Detections | Poses:
        found: Candidates = candidates.found if isinstance(candidates, _Segmented) else candidates
        boxes = found.boxes if self._grid is None else self._grid.decode(found.boxes, found.cells)
        scores, class_ids, extras = found.scores, found.class_ids, found.extras
        if (sound := finite(boxes, scores)) is not None:
            boxes, scores, class_ids = boxes[sound], scores[sound], class_ids[sound]
            extras = None if extras is None else extras[sound]
        if not len(scores):
            return no_poses(len(self.names.keypoints)) if self.task == "pose" else nothing()
        if self._scale is not None:
            boxes = boxes * self._scale
        if self.task == "obb" and extras is not None:
            return self._oriented(boxes, scores, class_ids, extras[:, 0], placement)
        corners = corners_of(boxes, self._form)
        order = self._selection.keep(corners, scores, class_ids)
        if extras is None:
            return detections(corners.take(order, 0), scores.take(order), class_ids.take(order), placement)
        boxed = Detections(placement.to_source(corners[order]), scores[order], class_ids[order])
        if self.task == "pose":
            return posed(boxed, extras[order].reshape(len(order), -1, self._head.values), placement, self._scale)
        assert isinstance(candidates, _Segmented)
        return masks_of(boxed, extras[order], candidates.prototypes, placement, self.preprocess)

    def _ended(self, picture: NDArray[Any]) -> Candidates:
        """The candidates of a head that has chosen already."""
        threshold = np.float32(self._selection.threshold)
        with np.errstate(invalid="ignore"):
            scores, classes = picture[:, 4].astype(np.float32), picture[:, 5].astype(np.float32)
            named = (classes >= 0) & (classes < len(self.names.labels))
            cells = np.flatnonzero((scores >= threshold) & named)
        return Candidates(
            cells,
            picture[cells, :4].astype(np.float32),
            scores[cells],
            classes[cells].astype(np.int64),
            picture[cells, 6:].astype(np.float32) if self._head.extras else None,
        )

    def _oriented(
        self, boxes: Floats, scores: Floats, class_ids: NDArray[np.int64], angles: Floats, placement: Placement
    ) -> Detections:
        wanted = self._selection.wanted(scores, class_ids)
        order = wanted[np.argsort(-scores[wanted], kind="stable")]
        if self._selection.nms != "none":
            together = class_ids[order] if self._selection.nms == "class" else np.zeros(len(order), np.int64)
            order = order[fast_nms(boxes[order], angles[order], together, self._iou)]
        order = order[: self._most]
        corners = placement.to_source(turned_corners(boxes[order], angles[order]), inside=False)
        hull = np.concatenate((corners.min(1), corners.max(1)), 1)
        limit = np.array([placement.source_width, placement.source_height] * 2, np.float32)
        hull = np.clip(hull, 0, limit)
        return visible(Detections(hull, scores[order], class_ids[order], corners=corners))


Family = YoloFamily

_PROSE = {
    "dense": "an anchor-free YOLO head",
    "objectness": "a YOLO head with objectness and three anchors a cell, as in YOLOv5 and v7",
    "yolox": "a YOLOX head, one row a cell",
    "queries": "a list of boxes with one probability a class, as RT-DETR's of Ultralytics",
    "end_to_end": "a list of boxes with score and class, as in YOLOv10 and YOLO26",
}


class _Grid:
    """YOLOX's cells: their column, row and stride, in the order of its output."""

    def __init__(self, spec: PreprocessSpec, strides: Sequence[int]) -> None:
        cells, sizes = [], []
        for stride in strides:
            rows, columns = np.mgrid[0 : spec.height // stride, 0 : spec.width // stride]
            cells.append(np.stack((columns.ravel(), rows.ravel()), 1))
            sizes.append(np.full(rows.size, stride))
        self.cells = np.concatenate(cells).astype(np.float32)
        self.strides = np.concatenate(sizes).astype(np.float32)

    def decode(self, raw: Floats, cells: NDArray[np.int64]) -> Floats:
        """Cx cy w h in input pixels of the cells at these indices."""
        stride = self.strides[cells, None]
        centers = (raw[:, :2] + self.cells[cells]) * stride
        sizes = np.exp(np.clip(raw[:, 2:4], -LOG_LIMIT, LOG_LIMIT)) * stride
        return np.concatenate((centers, sizes), 1)


def _grid(spec: PreprocessSpec, options: YoloOptions, cells: int | None) -> _Grid:
    """The grid of the strides that make so many cells. Raises `ModelError`."""
    tried = [options.strides] if options.strides else STRIDES
    for strides in tried:
        grid = _Grid(spec, strides)
        if cells in (None, len(grid.strides)):
            return grid
    made = len(_Grid(spec, tried[0]).strides)
    raise ModelError(
        f"the model gives {cells} cells, but strides {tried[0]} over {spec.width}x{spec.height} make {made}; "
        "set options.strides or preprocess.size"
    )


def _names(meaning: Meaning, options: YoloOptions, head: YoloHead) -> Names:
    try:
        labels = labels_of(meaning.labels, meaning.facts, head.classes)
    except ModelError as error:
        if options.head == "auto" and head.kind == "yolox":
            raise ModelError(
                f'{error}; if it is a YOLOv8 whose output is transposed, set options.head = "dense"'
            ) from error
        raise
    if head.task != "pose":
        return Names(labels)
    names, skeleton = keypoint_names(options.keypoints, options.skeleton, meaning.facts, head.extras // head.values)
    return Names(labels, names, skeleton)


def _boxes_form(options: YoloOptions, head: YoloHead, spec: PreprocessSpec) -> tuple[BoxFormat, Floats | None]:
    corners = head.kind == "end_to_end" and head.task != "obb"
    form: BoxFormat = options.box_format or ("xyxy" if corners else "cxcywh")
    if (options.box_units or ("normalized" if head.kind == "queries" else "pixels")) == "pixels":
        return form, None
    return form, np.array([spec.width, spec.height] * 2, np.float32)
