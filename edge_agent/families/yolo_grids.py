"""YOLO heads as the network leaves them: one grid a stride, with anchors (YOLOv3, v4, v5, v7 before decoding).

A grid is [B, A * (5 + C), H, W], [B, A, H, W, 5 + C], or either with its channels last; values a cell and anchor:
tx ty tw th, objectness, one logit a class. With s the stride:
- `v3`: x = (column + k (sigma(tx) - 0.5) + 0.5) s, w = anchor e^tw (Redmon, Farhadi, "YOLOv3", arXiv 1804.02767; k is
  YOLOv4's `center_scale`, 1 in v3);
- `v5`: x = (column + 2 sigma(tx) - 0.5) s, w = anchor (2 sigma(tw))² (Ultralytics YOLOv5; YOLOv7).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import Positive, Share, Table
from edge_agent.data import Candidates, Detections, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import LOG_LIMIT, BoxOptions, Floats, Selection, decoded, sigmoid
from edge_agent.families._metadata import file_labels, labels_of, require_real
from edge_agent.families._pictures import RGB_0_1, picture_spec, shown
from edge_agent.geometry import Placement

Pairs = list[list[tuple[float, float]]]

_DEFAULT_ANCHORS: Pairs = [
    [(10, 13), (16, 30), (33, 23)],
    [(30, 61), (62, 45), (59, 119)],
    [(116, 90), (156, 198), (373, 326)],
]
_TINY_ANCHORS: Pairs = [[(10, 14), (23, 27), (37, 58)], [(81, 82), (135, 169), (344, 319)]]


_RAW_DFL = 64 + 80


class GridOptions(BoxOptions):
    """`[models.<name>.options]` of a YOLO model with raw grids; `anchors`: pixels, finest grid first;
    `center_scale`: one number, or one a grid, as YOLOv4's `scale_x_y`."""

    style: Literal["v3", "v5"] = "v5"
    anchors: list[list[tuple[float, float]]] | None = None
    center_scale: Positive | list[Positive] = 1.0
    activated: bool = False
    objectness_threshold: Share | None = None


@dataclass(frozen=True, slots=True)
class _Level:
    """A grid as it lies in memory; `axes` brings it to [B, A, 5 + C, H, W] once it is `split`."""

    output: str
    split: tuple[int, ...]
    axes: tuple[int, ...]
    rows: int
    columns: int
    values: int
    center_scale: float = 1.0


class YoloGridFamily:
    """Boxes with classes and scores."""

    Options: ClassVar[type[Table]] = GridOptions
    takes_batches = True
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        if len(facts.outputs) not in (2, 3, 4) or any(len(spec.shape) not in (4, 5) for spec in facts.outputs):
            return None
        labels = file_labels(facts)
        try:
            levels = _levels(facts, [3] * len(facts.outputs), None if labels is None else len(labels))
        except ModelError:
            return None
        if any(spec.shape[1] == _RAW_DFL for spec in facts.outputs):
            return None  # YOLOv8's, with distributions of sides and 80 classes
        sides = [level.rows for level in levels]
        if any(fine != 2 * coarse for fine, coarse in itertools.pairwise(sides)):
            return None
        because = [
            f"{len(levels)} grids of {', '.join(map(str, sides))} rows and three anchors a cell are YOLO's, raw",
            "boxes are taken for YOLOv5's and v7's; YOLOv3 and v4 want options.style = \"v3\"",
        ]
        return Guess(2, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, GridOptions)
        count = len(meaning.facts.outputs)
        require_real(meaning.facts, *(spec.name for spec in meaning.facts.outputs))
        anchors = options.anchors
        if anchors is None:
            anchors = _TINY_ANCHORS if count == 2 else _DEFAULT_ANCHORS
        if len(anchors) != count:
            raise ModelError(f"options.anchors has {len(anchors)} lists, the model {count} grids; one list a grid")
        if len({len(pairs) for pairs in anchors}) != 1 or not anchors[0]:
            raise ModelError("options.anchors: every grid has as many anchors, one at least")
        labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
        known = len(labels) if labels is not None else None
        scales = options.center_scale if isinstance(options.center_scale, list) else [options.center_scale] * count
        if len(scales) != count:
            raise ModelError(f"options.center_scale has {len(scales)} numbers, the model {count} grids")
        levels = _levels(meaning.facts, [len(pairs) for pairs in anchors], known)
        self._levels = [replace(level, center_scale=scale) for level, scale in zip(levels, scales, strict=True)]
        self._anchors = [np.array(pairs, np.float32) for pairs in anchors]
        self.preprocess = picture_spec(meaning, **RGB_0_1)
        self.names = Names(labels_of(meaning.labels, meaning.facts, self._levels[0].values - 5))
        self._selection = Selection(options, meaning.thresholds, self.names.labels)
        self._options = options
        least = options.objectness_threshold
        self._least = self._selection.threshold if least is None else least

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        levels = [self._split(outputs[level.output], level) for level in self._levels]
        return [self._reduce([grid[index] for grid in levels]) for index in range(len(levels[0]))]

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        return decoded(candidates, self._selection, placement, form="cxcywh")

    def _split(self, raw: NDArray[Any], level: _Level) -> NDArray[Any]:
        wanted = (len(raw), *level.split)
        if raw.size != math.prod(wanted):
            raise EngineError(f"{level.output}: the model gave {list(raw.shape)}, not {list(wanted)}")
        grids: NDArray[Any] = raw.reshape(wanted).transpose(level.axes)
        return grids

    def _reduce(self, grids: Sequence[NDArray[Any]]) -> Candidates:
        """`grids`: [A, 5 + C, H, W] of one picture."""
        parts = [self._level(*parts) for parts in zip(grids, self._levels, self._anchors, strict=True)]
        boxes, scores, class_ids = (np.concatenate(values) for values in zip(*parts, strict=True))
        best = np.argsort(-scores, kind="stable")[: self._options.top_k]
        return Candidates(best, boxes[best], scores[best], class_ids[best])

    def _level(self, grid: NDArray[Any], level: _Level, anchors: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
        with np.errstate(invalid="ignore", over="ignore"):
            which, rows, columns = np.nonzero(self._on(grid[:, 4]) >= np.float32(self._least))
            values = grid[which, :, rows, columns].astype(np.float32)
            classes = self._on(values[:, 5:]) * self._on(values[:, 4:5])
            scores, class_ids = classes.max(1, initial=0.0), classes.argmax(1)
            boxes = self._boxes(values[:, :4], np.stack((columns, rows), 1), anchors[which], level)
        kept = scores >= np.float32(self._selection.threshold)
        return boxes[kept], scores[kept], class_ids[kept]

    def _boxes(self, raw: Floats, cells: NDArray[np.intp], anchors: Floats, level: _Level) -> Floats:
        stride = np.array([self.preprocess.width / level.columns, self.preprocess.height / level.rows], np.float32)
        centers = self._on(raw[:, :2])
        if self._options.style == "v5":
            centers = centers * 2 - 0.5
            sizes = (self._on(raw[:, 2:]) * 2) ** 2
        else:
            centers = (centers - 0.5) * level.center_scale + 0.5
            sizes = np.exp(np.clip(raw[:, 2:], -LOG_LIMIT, LOG_LIMIT))
        return np.concatenate(((centers + cells) * stride, sizes * anchors), 1).astype(np.float32)

    def _on(self, values: NDArray[Any]) -> Floats:
        """Logits as probabilities, unless the network has done that."""
        return values.astype(np.float32, copy=False) if self._options.activated else sigmoid(values)


Family = YoloGridFamily


def _levels(facts: ModelFacts, anchors: Sequence[int], classes: int | None) -> list[_Level]:
    """The grids, finest first. Raises `ModelError`."""
    levels = sorted((_level(spec, anchors[0], classes) for spec in facts.outputs), key=lambda level: -level.rows)
    if len({level.values for level in levels}) != 1:
        raise ModelError(f"the grids hold {[level.values for level in levels]} values an anchor; they must be alike")
    return levels


def _level(spec: TensorSpec, anchors: int, classes: int | None) -> _Level:
    shape = spec.shape[1:]
    if all(side is not None for side in shape):
        sides = [side for side in shape if side is not None]
        for split, axes, rows, columns in _layouts(sides, anchors):
            values = split[axes[2] - 1]
            if values > 5 and classes in (None, values - 5):
                return _Level(spec.name, split, axes, rows, columns, values)
    told = "" if classes is None else f" and {classes} classes"
    raise ModelError(f"{spec.name} {shown(spec.shape)} is no grid with {anchors} anchors{told}; set options.anchors")


def _layouts(sides: Sequence[int], anchors: int) -> Sequence[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """The ways to read a grid's sides: split, axes, rows, columns; the likelier first."""
    if len(sides) == 3:
        first, middle, last = sides
        found = []
        if first % anchors == 0 and first // anchors > 5 and (last % anchors or first > last or middle == last):
            found.append(((anchors, first // anchors, middle, last), (0, 1, 2, 3, 4), middle, last))
        if last % anchors == 0 and last // anchors > 5:
            found.append(((first, middle, anchors, last // anchors), (0, 3, 4, 1, 2), first, middle))
        return found
    if len(sides) == 4 and sides[0] == anchors:
        return [((*sides,), (0, 1, 4, 2, 3), sides[1], sides[2])]
    if len(sides) == 4 and sides[2] == anchors:
        return [((*sides,), (0, 3, 4, 1, 2), sides[0], sides[1])]
    return []
