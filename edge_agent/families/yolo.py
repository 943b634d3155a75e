"""Detectors of the YOLO kind: the dense anchor-free head, and YOLOX's grid head.

Heads, told apart by `options.head` or by shape:
- `dense` [B, 4 + C, N]: rows cx, cy, w, h in input pixels, then one probability a class (YOLOv8, v9,
  11, 12 as exported by their makers, and the bundled models).
- `yolox` [B, N, 5 + C]: dx, dy, log w, log h in grid units, objectness, one probability a class
  (Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430), strides 8, 16 and 32.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Table
from edge_agent.data import Candidates, Detections, ModelFacts, PreprocessSpec, Reduction, Tensors
from edge_agent.errors import ModelError
from edge_agent.families import Meaning, _dense, adjusted
from edge_agent.geometry import Placement

Head = Literal["dense", "yolox"]

_MAX_CANDIDATES = 1000  # a picture, before NMS; the best by score
_LOG_LIMIT = 16.0  # e^16 strides are larger than any picture


class YoloOptions(Table):
    """`[models.<name>.options]` of a YOLO model."""

    head: Literal["auto", "dense", "yolox"] = "auto"
    strides: tuple[int, ...] = (8, 16, 32)


class YoloFamily:
    """Boxes with classes and scores."""

    Options: ClassVar[type[Table]] = YoloOptions
    task = "detect"

    def __init__(self, meaning: Meaning) -> None:
        if not hasattr(cv2.dnn, "NMSBoxesBatched"):
            raise ModelError(f"OpenCV {cv2.__version__} is too old for batched NMS; 4.7 or newer is needed")
        options = meaning.options
        assert isinstance(options, YoloOptions)
        output = _only_output(meaning.facts)
        shape = _output_shape(meaning.facts)
        self.head: Head = _head(shape) if options.head == "auto" else options.head
        self.preprocess = adjusted(_defaults(self.head, meaning), meaning.preprocess)
        classes = _class_count(self.head, shape)
        self.labels = _labels(meaning, classes)
        self._thresholds = meaning.thresholds
        cells = None
        if self.head == "yolox":
            self._grid = _Grid(self.preprocess, options.strides)
            if shape[1] not in (None, len(self._grid.strides)):
                raise ModelError(
                    f"the model gives {shape[1]} cells, but strides {options.strides} over "
                    f"{self.preprocess.width}x{self.preprocess.height} make {len(self._grid.strides)}; "
                    "set options.strides or preprocess.size"
                )
            cells = len(self._grid.strides)
        self.reduction = Reduction(
            output=output,
            rows_first=self.head == "dense",
            has_objectness=self.head == "yolox",
            threshold=meaning.thresholds.score,
            max_candidates=_MAX_CANDIDATES,
            cells=cells,
        )

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        return _dense.reduce(outputs[self.reduction.output], self.reduction)

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        boxes, scores, class_ids = self._sound(candidates)
        if not len(scores):
            return _NOTHING
        limits = self._thresholds
        cornered = boxes.copy()  # x y w h
        cornered[:, :2] -= boxes[:, 2:] * 0.5
        kept = cv2.dnn.NMSBoxesBatched(
            cornered.tolist(), scores.tolist(), class_ids.tolist(), limits.score, limits.iou
        )  # best first
        order = np.array(kept[: limits.max_detections], np.intp)
        corners = cornered[order]
        corners[:, 2:] += corners[:, :2]
        corners = placement.to_source(corners)
        scores, class_ids = scores[order], class_ids[order]
        has_extent = corners[:, 2:] > corners[:, :2]
        if has_extent.all():
            return Detections(corners, scores, class_ids)
        visible = has_extent.all(1)
        return Detections(corners[visible], scores[visible], class_ids[visible])

    def _sound(self, found: Candidates) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (cx cy w h in input pixels), scores and classes of the candidates whose numbers are numbers."""
        boxes = self._grid.decode(found.boxes, found.cells) if self.head == "yolox" else found.boxes
        if np.isfinite(boxes).all() and np.isfinite(found.scores).all():  # the usual case, cheaply
            return boxes, found.scores, found.class_ids
        sound = np.isfinite(boxes).all(1) & np.isfinite(found.scores)
        return boxes[sound], found.scores[sound], found.class_ids[sound]


Family = YoloFamily

_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


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

    def decode(self, raw: NDArray[np.float32], cells: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cx cy w h in input pixels of the cells at these indices."""
        stride = self.strides[cells, None]
        centers = (raw[:, :2] + self.cells[cells]) * stride
        sizes = np.exp(np.clip(raw[:, 2:4], -_LOG_LIMIT, _LOG_LIMIT)) * stride
        return np.concatenate((centers, sizes), 1)


def _only_output(facts: ModelFacts) -> str:
    if len(facts.outputs) != 1:
        names = ", ".join(spec.name for spec in facts.outputs)
        raise ModelError(f"a YOLO head has one output, this model has {len(facts.outputs)}: {names}")
    return facts.outputs[0].name


def _output_shape(facts: ModelFacts) -> tuple[int | None, ...]:
    shape = facts.outputs[0].shape
    if len(shape) != 3:
        raise ModelError(
            f"a YOLO head is [batch, 4 + classes, cells] or [batch, cells, 5 + classes], not {list(shape)}"
        )
    return shape


def _head(shape: tuple[int | None, ...]) -> Head:
    rows, columns = shape[1], shape[2]
    if rows is not None and (columns is None or columns > rows):
        return "dense"
    raise ModelError(
        f"the output {list(shape)} does not tell its head: cells lie first, as in YOLOX and others; "
        'set options = { head = "yolox" } if it is one'
    )


def _class_count(head: Head, shape: tuple[int | None, ...]) -> int:
    rows = shape[1] if head == "dense" else shape[2]
    if rows is None:
        raise ModelError(f"the output {list(shape)} does not say how many classes there are")
    count = rows - (4 if head == "dense" else 5)
    if count < 1:
        raise ModelError(f"the output {list(shape)} leaves no room for classes in a {head} head")
    return count


def _labels(meaning: Meaning, classes: int) -> Sequence[str]:
    """The entry's labels, else the file's own, else the ids as names."""
    labels = meaning.labels
    origin = "the entry"
    if labels is None and (names := meaning.facts.metadata.get("names")):
        labels, origin = _names(names), "the model's metadata"
    if labels is None:
        return tuple(f"class_{i}" for i in range(classes))
    if len(labels) != classes:
        raise ModelError(f"{origin} names {len(labels)} labels, the model's output has {classes} classes")
    return tuple(labels)


def _names(text: str) -> Sequence[str]:
    """Ultralytics' `names` metadata: a Python literal, {0: 'person', …} or a list."""
    names = _literal("names", text)
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        return [str(names[key]) for key in sorted(names)]
    if isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    raise ModelError(f"the model's metadata 'names' is neither a table by number nor a list: {text[:80]!r}")


def _literal(key: str, text: str) -> object:
    """A value of the file's metadata, where Ultralytics writes Python literals."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ModelError(f"the model's metadata {key!r} cannot be read: {text[:80]!r}") from error
    return value


def _defaults(head: Head, meaning: Meaning) -> PreprocessSpec:
    width, height = _input_size(meaning)
    dtype = meaning.facts.inputs[0].dtype
    if dtype not in ("float32", "float16"):
        raise ModelError(f"a YOLO model takes float32 or float16 pictures, this one {dtype}")
    if head == "yolox":
        return PreprocessSpec(width, height, anchor="top-left", color="bgr", scale=1.0, dtype=dtype)  # type: ignore[arg-type]
    return PreprocessSpec(width, height, dtype=dtype)  # type: ignore[arg-type]


def _input_size(meaning: Meaning) -> tuple[int, int]:
    if meaning.preprocess.size:
        return meaning.preprocess.size
    shape = meaning.facts.inputs[0].shape
    if len(shape) == 4 and shape[2] and shape[3]:
        return shape[3], shape[2]
    if size := meaning.facts.metadata.get("imgsz"):
        match _literal("imgsz", size):
            case int(side):
                return side, side
            case [int(height), int(width)]:
                return width, height
    raise ModelError(f"the model's input {list(shape)} has no fixed size; set preprocess.size = [width, height]")
