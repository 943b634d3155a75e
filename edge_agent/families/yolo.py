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
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_agent.config import Count, Table
from edge_agent.data import (
    Candidates,
    Detections,
    ModelFacts,
    Names,
    Poses,
    PreprocessSpec,
    Reduction,
    Tensors,
    TensorSpec,
)
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning, _dense
from edge_agent.families._boxes import (
    LOG_LIMIT,
    BoxFormat,
    BoxOptions,
    BoxUnits,
    Floats,
    Selection,
    chosen,
    corners_of,
    detections,
    finite,
    nothing,
)
from edge_agent.families._keypoints import keypoint_names, no_poses, posed
from edge_agent.families._masks import masks_of
from edge_agent.families._metadata import file_labels, labels_of, literal, require_real
from edge_agent.families._oriented import fast_nms, turned_corners
from edge_agent.families._pictures import BGR_0_255, RGB_0_1, outputs_of, picture_sides, picture_spec, shown
from edge_agent.geometry import Placement

Head = Literal["dense", "objectness", "yolox", "end_to_end", "queries"]
Task = Literal["detect", "segment", "pose", "obb"]

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
"""That YOLO models have, the commonest first."""
_ANCHORS = 3  # a cell, of heads with objectness
_MOST_END_TO_END = 1000
_MANY_CLASSES = 1000
_TASKS: dict[str, Task] = {"detect": "detect", "segment": "segment", "pose": "pose", "obb": "obb"}


class YoloOptions(BoxOptions):
    """`[models.<name>.options]` of a YOLO model. `classes`: how many, where the output does not tell."""

    head: Literal["auto", "dense", "objectness", "yolox", "end_to_end", "queries"] = "auto"
    task: Literal["auto", "detect", "segment", "pose", "obb"] = "auto"
    strides: Annotated[tuple[Count, ...], Meta(min_length=1)] | None = None
    classes: Count | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    keypoints: list[str] | None = None
    skeleton: list[tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class _Head:
    """How the boxes' tensor is to be read; `extras`: values a cell after the classes; `values` a keypoint."""

    kind: Head
    task: Task
    output: str
    rows_first: bool
    classes: int
    extras: int
    values: int = 3
    prototypes: str | None = None

    @property
    def has_objectness(self) -> bool:
        return self.kind in ("objectness", "yolox")


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
            head = _head(facts, YoloOptions(), None)
        except ModelError:
            return None
        told = _told_task(facts) is not None
        because = [f"the output {head.output!r} {shown(_shape(facts, head.output))} is {_PROSE[head.kind]}"]
        if told:
            because.append(f"the file says its task is {facts.metadata['task']!r}")
        elif head.task == "segment":
            because.append(f"{head.prototypes!r} holds the prototypes of masks")
        elif head.task == "pose":
            because.append("56 rows without labels are one class and 17 keypoints")
        certain = told or head.kind == "objectness" or (head.kind == "end_to_end" and head.extras == 0)
        shape = _shape(facts, head.output)
        cells = _cells(facts, YoloOptions())
        fits = head.kind in ("end_to_end", "queries") or not cells or any(side in shape for side in cells)
        if not (told or fits or any(_ANCHORS * side in shape for side in cells)):
            return None  # a map, perhaps, that is wider than high
        certain = certain or any(side in shape[1:] for side in cells)
        return Guess(3 if told else 2 if certain else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, YoloOptions)
        self._head = head = _head(meaning.facts, options, meaning.labels)
        require_real(meaning.facts, head.output, head.prototypes or "")
        self.task: str = head.task
        defaults = BGR_0_255 | {"anchor": "top-left"} if head.kind == "yolox" else RGB_0_1
        if head.kind == "queries":
            defaults = {"resize": "stretch", **defaults}
        self.preprocess = picture_spec(meaning, **defaults)
        self.names = _names(meaning, options, head)
        self._selection = Selection(options, meaning.thresholds, self.names.labels)
        self._form, self._scale = _boxes_form(options, head, self.preprocess)
        self._ends_there = head.kind == "end_to_end"
        self._grid = None
        if head.kind == "yolox":
            self._grid = _grid(self.preprocess, options, _shape(meaning.facts, head.output)[1])
        if head.kind in ("end_to_end", "queries"):
            self._selection = Selection(
                msgspec.structs.replace(options, nms="none"), meaning.thresholds, self.names.labels
            )
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
            return detections(corners[order], scores[order], class_ids[order], placement)
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
        found = Detections(hull, scores[order], class_ids[order], corners=corners)
        is_seen = (hull[:, 2:] > hull[:, :2]).all(1)
        return found if is_seen.all() else chosen(found, np.flatnonzero(is_seen))


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
    tried = [options.strides] if options.strides else _STRIDES
    for strides in tried:
        grid = _Grid(spec, strides)
        if cells in (None, len(grid.strides)):
            return grid
    made = len(_Grid(spec, tried[0]).strides)
    raise ModelError(
        f"the model gives {cells} cells, but strides {tried[0]} over {spec.width}x{spec.height} make {made}; "
        "set options.strides or preprocess.size"
    )


def _head(facts: ModelFacts, options: YoloOptions, labels: Sequence[str] | None) -> _Head:
    """What the file's shapes and metadata, and the entry, say of the head. Raises `ModelError`."""
    boxes, prototypes = _outputs(facts)
    shape = boxes.shape
    task = _task(facts, options, prototypes)
    own = file_labels(facts)
    told = options.classes or (len(own) if own is not None else None)  # what the entry calls them decides on no head
    kind: Head = _kind(facts, shape, options, task, prototypes, told) if options.head == "auto" else options.head
    known = told or (len(labels) if labels is not None else None)
    rows_first = _is_rows_first(shape, kind)
    rows = shape[1] if rows_first else shape[2]
    if rows is None:
        raise ModelError(f"the output {shown(shape)} does not say how many classes there are; set its shape on export")
    fixed = {"dense": 4, "objectness": 5, "yolox": 5, "end_to_end": 6, "queries": 4}[kind]
    if task is None:
        task = "pose" if kind == "dense" and rows == 56 and known is None else "detect"
    extras, values = _extras(facts, options, task, prototypes, rows - fixed)
    classes = rows - fixed - extras
    if kind == "end_to_end":
        if classes != 0:
            raise ModelError(
                f"the output {shown(shape)} has {rows} values a box, a {task} head of this kind {6 + extras}"
            )
        classes = known or _MANY_CLASSES  # the output does not say how many there are
    if classes < 1:
        raise ModelError(f"the output {shown(shape)} leaves no room for classes in a {kind} head for {task}")
    named = prototypes.name if prototypes is not None and task == "segment" else None
    return _Head(kind, task, boxes.name, rows_first, classes, extras, values, named)


def _outputs(facts: ModelFacts) -> tuple[TensorSpec, TensorSpec | None]:
    """The tensor of the boxes, and that of the masks' prototypes."""
    flat = [spec for spec in facts.outputs if len(spec.shape) == 3]
    square = [spec for spec in facts.outputs if len(spec.shape) == 4]
    others = [spec for spec in facts.outputs if len(spec.shape) not in (3, 4, 5)]
    if len(flat) != 1 or len(square) > 1 or others:
        raise ModelError(
            "a YOLO head is one output, [batch, 4 + classes, cells] or [batch, cells, 5 + classes], "
            f"besides the prototypes of masks; this model's are {outputs_of(facts)}"
        )
    return flat[0], square[0] if square else None


def _task(facts: ModelFacts, options: YoloOptions, prototypes: TensorSpec | None) -> Task | None:
    if options.task != "auto":
        return options.task
    if told := _told_task(facts):
        return told
    return "segment" if prototypes is not None else None


def _told_task(facts: ModelFacts) -> Task | None:
    return _TASKS.get(facts.metadata.get("task", ""))


def _kind(
    facts: ModelFacts,
    shape: tuple[int | None, ...],
    options: YoloOptions,
    task: Task | None,
    prototypes: TensorSpec | None,
    known: int | None,
) -> Head:
    _, first, last = shape
    cells = _cells(facts, options)
    if first is not None and (last is None or last > first):
        return "dense"
    if last is not None and first is not None:
        if first in (_ANCHORS * side for side in cells):
            return "objectness"
        extras = _extras(facts, options, task or "detect", prototypes, last - 4)[0]
        if first in cells:
            return "dense" if known is not None and last - 4 - extras == known else "yolox"
    if last is not None and first is not None and first <= _MOST_END_TO_END:
        extras = _extras(facts, options, task or "detect", prototypes, last - 6)[0]
        if last == 6 + extras:
            return "end_to_end"
        if known is not None and last == 4 + known:
            return "queries"
    raise ModelError(
        f"the output {shown(shape)} does not tell its head for this input; "
        'set options.head to "dense", "objectness", "yolox", "end_to_end" or "queries"'
    )


def _cells(facts: ModelFacts, options: YoloOptions) -> list[int]:
    """How many cells the strides may make; none where the input's size is not fixed."""
    height, width = picture_sides(facts)
    if not height or not width:
        return []
    tried = [options.strides] if options.strides else _STRIDES
    return [sum((height // stride) * (width // stride) for stride in strides) for strides in tried]


def _is_rows_first(shape: tuple[int | None, ...], kind: Head) -> bool:
    if kind != "dense":
        return False
    _, first, last = shape
    return first is not None and (last is None or last > first)


def _extras(
    facts: ModelFacts, options: YoloOptions, task: Task, prototypes: TensorSpec | None, room: int
) -> tuple[int, int]:
    """Values a cell after the classes, and how many of them make a keypoint."""
    if task == "obb":
        return 1, 0
    if task == "segment":
        count = None if prototypes is None else prototypes.shape[1]
        if count is None:
            raise ModelError("a YOLO model that segments has a second output, [batch, coefficients, height, width]")
        return count, 0
    if task == "pose":
        points, values = _keypoint_shape(facts, options, room)
        return points * values, values
    return 0, 0


def _keypoint_shape(facts: ModelFacts, options: YoloOptions, room: int) -> tuple[int, int]:
    if text := facts.metadata.get("kpt_shape"):
        match literal("kpt_shape", text):
            case [int(points), int(2 | 3 as values)] if points > 0:
                return points, values
        raise ModelError(f"the model's metadata 'kpt_shape' is {text!r}, not [keypoints, 2 or 3]")
    points = len(options.keypoints) if options.keypoints else 17
    return points, 2 if room in (2 * points, 2 * points + 1) and room < 3 * points else 3


def _names(meaning: Meaning, options: YoloOptions, head: _Head) -> Names:
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


def _boxes_form(options: YoloOptions, head: _Head, spec: PreprocessSpec) -> tuple[BoxFormat, Floats | None]:
    corners = head.kind == "end_to_end" and head.task != "obb"
    form: BoxFormat = options.box_format or ("xyxy" if corners else "cxcywh")
    if (options.box_units or ("normalized" if head.kind == "queries" else "pixels")) == "pixels":
        return form, None
    return form, np.array([spec.width, spec.height] * 2, np.float32)


def _shape(facts: ModelFacts, output: str) -> tuple[int | None, ...]:
    return next(spec.shape for spec in facts.outputs if spec.name == output)
