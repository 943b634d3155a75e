"""Detectors whose boxes, scores and classes come in tensors of their own.

- Chosen already: boxes [B, N, 4], scores [B, N], classes [B, N], and how many count [B] or [B, 1] (EfficientNMS,
  TensorFlow's detection models, torchvision's, RT-DETR exported with its post-processing).
- The same in one tensor: boxes and scores [B, N, 5] beside labels [B, N] (MMDeploy), or rows [N, 6] and [N, 7] of which
  `columns` says what is where (PP-YOLOE, YOLOv7, EfficientDet).
- Not yet: boxes [B, N, 4] and scores [B, N, C] or [B, C, N], which want NMS (YOLO-NAS, PP-YOLOE, UltraFace, SSD without
  its last step).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent import plugins
from edge_agent.config import Table
from edge_agent.data import Candidates, Detections, ModelFacts, Names, Tensors, TensorSpec
from edge_agent.errors import EngineError, ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import (
    MANY_CLASSES,
    BoxFormat,
    BoxOptions,
    BoxUnits,
    Selection,
    decoded,
    sigmoid,
    softmax,
)
from edge_agent.families._metadata import file_labels, labels_of, require_real
from edge_agent.families._pictures import (
    BGR_0_255,
    RGB_0_1,
    RGB_SIGNED,
    is_interleaved,
    output_of,
    outputs_of,
    picture_spec,
    shown,
)
from edge_agent.geometry import Placement

_WORDS = {
    "count": ("num", "count", "valid"),
    "boxes": ("box", "loc"),
    "scores": ("score", "conf", "prob"),
    "classes": ("class", "label", "cls"),
}
Column = Literal["batch", "x1", "y1", "x2", "y2", "score", "class"]
_ROWS: Mapping[int, list[Column]] = {
    6: ["class", "score", "x1", "y1", "x2", "y2"],  # PaddleDetection
    7: ["batch", "x1", "y1", "x2", "y2", "class", "score"],  # YOLOv7
}


class SsdOptions(BoxOptions):
    """`[models.<name>.options]` of such a detector. `outputs`: the tensors of boxes, scores, classes and count, where
    they are not told by name and shape; `first_class`: the number that the model gives the first label;
    `background`: which column of the scores is no class; `columns`: of a single output of rows."""

    outputs: dict[Literal["boxes", "scores", "classes", "count"], str] = msgspec.field(default_factory=dict)
    columns: list[Column] | None = None
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    first_class: int | None = None
    background: Literal["auto", "none", "first", "last"] = "auto"
    activation: Literal["none", "softmax", "sigmoid"] = "none"


@dataclass(frozen=True, slots=True)
class _Roles:
    """The names of the tensors. `is_certain`: whether scores and classes were told apart by name or type; `is_turned`:
    scores are [B, C, N]."""

    boxes: str
    scores: str
    classes: str | None
    count: str | None
    columns: int | None
    is_certain: bool
    is_turned: bool = False


class SsdFamily:
    """Boxes with classes and scores."""

    Options: ClassVar[type[Table]] = SsdOptions
    takes_batches = True
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        if (rows := _row_output(facts, None)) is not None:
            listed = ", ".join(_ROWS[rows.shape[-1] or 0])
            return Guess(2, [f"the output {rows.name!r} {shown(rows.shape)} is taken for rows of {listed}"])
        try:
            roles = _roles(facts, {})
        except ModelError:
            return None
        listed = ", ".join(f"{role} {name!r}" for role in _WORDS if (name := getattr(roles, role)))
        scores = output_of(facts, roles.scores)
        told = _told_by_name(scores.name) == "scores" or roles.count is not None
        form, units = _box_form(facts, roles)
        because = [f"the outputs are {listed}", f"boxes are taken for {form}, {units}"]
        return Guess(3 if told else 2 if roles.classes else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, SsdOptions)
        facts = meaning.facts
        rows = _row_output(facts, options.columns)
        self._columns_of: Sequence[Column] | None = None
        if rows is not None:
            self._columns_of = options.columns or _ROWS[rows.shape[-1] or 0]
            roles = _Roles(rows.name, rows.name, rows.name, None, None, True)
        else:
            roles = _roles(facts, {str(role): name for role, name in options.outputs.items()})
        self._roles = roles
        require_real(meaning.facts, roles.boxes, roles.scores)
        self.takes_batches = rows is None and len(output_of(facts, roles.boxes).shape) == 3
        self._options = options
        is_tensorflow = is_interleaved(facts)
        # Detectors of this kind see the whole picture stretched; TensorFlow's want -1..1.
        # What ends in a plugin of TensorRT was a YOLO, which wants letterboxes.
        is_yolo = rows is not None or roles.count is not None
        resize = "letterbox" if is_yolo and not is_tensorflow else "stretch"
        defaults: dict[str, Any] = {"resize": resize, **(RGB_SIGNED if is_tensorflow else RGB_0_1)}
        if roles.scores == roles.boxes and rows is None:  # MMDeploy's, of a YOLOX
            defaults = {"resize": "letterbox", "anchor": "top-left", **BGR_0_255}
        if _is_ultraface(roles):
            defaults |= {"scale": 1.0, "mean": (127.0,) * 3, "std": (128.0,) * 3}
        self.preprocess = picture_spec(meaning, **defaults)
        # TensorFlow's detection models count classes from 1, what its Lite makes of them from 0.
        counts_from_1 = roles.classes is not None and roles.classes.startswith("detection_classes")
        self._first_class = int(counts_from_1) if options.first_class is None else options.first_class
        form, units = _box_form(facts, roles)
        self._form: BoxFormat = options.box_format or form
        self._scale = None
        if (options.box_units or units) == "normalized":
            self._scale = np.array([self.preprocess.width, self.preprocess.height] * 2, np.float32)
            if self._form == "yxyx":
                self._scale = self._scale[[1, 0, 3, 2]]
        self._columns = _columns(meaning, options, roles)
        self.names = Names(self._labels(meaning))
        if roles.classes is not None:
            options = msgspec.structs.replace(options, nms="none")
        self._selection = Selection(options, meaning.thresholds, self.names.labels)

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        roles = self._roles
        if self._columns_of is not None:
            return self._rows(outputs[roles.boxes], self._columns_of)
        boxes, scores = outputs[roles.boxes], outputs[roles.scores]
        if roles.scores == roles.boxes:
            boxes, scores = boxes[..., :4], boxes[..., 4]
        if boxes.ndim == 2:  # no batch axis, and one picture
            boxes, scores = boxes[None], scores[None]
        if roles.classes is None:
            if roles.is_turned:
                scores = scores.transpose(0, 2, 1)
            return [self._dense(*picture) for picture in zip(boxes, scores, strict=True)]
        classes = outputs[roles.classes].reshape(scores.shape)
        if not roles.is_certain and _are_whole(scores) and not _are_whole(classes):
            scores, classes = classes, scores
        counts = [scores.shape[1]] * len(scores)
        if roles.count is not None:
            counts = [int(count) if np.isfinite(count) else 0 for count in outputs[roles.count].ravel().tolist()]
        return [self._chosen(*picture) for picture in zip(boxes, scores, classes, counts, strict=True)]

    def decode(self, candidates: Candidates, placement: Placement) -> Detections:
        return decoded(candidates, self._selection, placement, form=self._form, scale=self._scale)

    def _chosen(self, boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any], count: int) -> Candidates:
        with np.errstate(invalid="ignore"):
            numbers = classes.astype(np.float32) - self._first_class
            valid = (scores.astype(np.float32) >= np.float32(self._selection.threshold)) & (numbers >= 0)
            valid &= numbers < len(self.names.labels)
        valid[max(0, count) :] = False
        rows = np.flatnonzero(valid)
        return Candidates(
            rows, boxes[rows].astype(np.float32), scores[rows].astype(np.float32), numbers[rows].astype(np.int64)
        )

    def _rows(self, rows: NDArray[Any], columns: Sequence[Column]) -> Sequence[Candidates]:
        """Of one list of rows, or of one a picture."""
        if rows.shape[-1] != len(columns):
            raise EngineError(f"the model gave rows of {rows.shape[-1]} values, options.columns names {len(columns)}")
        lists = list(rows) if rows.ndim == 3 else [rows]
        order = [columns.index(side) for side in ("x1", "y1", "x2", "y2")]
        return [
            self._chosen(one[:, order], one[:, columns.index("score")], one[:, columns.index("class")], len(one))
            for one in lists
        ]

    def _dense(self, boxes: NDArray[Any], scores: NDArray[Any]) -> Candidates:
        with np.errstate(invalid="ignore", over="ignore"):
            if self._options.activation == "softmax":
                scores = softmax(scores)
            elif self._options.activation == "sigmoid":
                scores = sigmoid(scores)
            likely = scores[:, self._columns].astype(np.float32, copy=False)
            best = likely.max(1)
            rows = np.flatnonzero(best >= np.float32(self._selection.threshold))
        if len(rows) > self._options.top_k:
            rows = rows[np.argsort(-best[rows], kind="stable")[: self._options.top_k]]
        return Candidates(rows, boxes[rows].astype(np.float32), best[rows], likely[rows].argmax(1))

    def _labels(self, meaning: Meaning) -> Sequence[str]:
        if self._roles.classes is None:
            columns = self._roles.columns or 0
            return labels_of(meaning.labels, meaning.facts, len(range(columns)[self._columns]))
        given = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
        return tuple(given) if given is not None else tuple(f"class_{i}" for i in range(MANY_CLASSES))


Family = SsdFamily


def _roles(facts: ModelFacts, given: Mapping[str, str]) -> _Roles:
    """Which output is what, by the entry, by name, by shape and by order. Raises `ModelError`."""
    outputs = {spec.name: spec for spec in facts.outputs}
    for name in given.values():
        if name not in outputs:
            raise ModelError(f"options.outputs: there is no output {name!r}{plugins.nearest(name, list(outputs))}")
    left = [spec for spec in facts.outputs if spec.name not in given.values()]
    found = given.get("boxes") or _first(left, lambda spec: _is_boxes(spec) and _told_by_name(spec.name) != "scores")
    boxes = found or _first(left, _is_scored)
    if boxes is None:
        raise ModelError(f"no output holds boxes, [batch, number, 4]; this model's are {outputs_of(facts)}")
    rank = len(outputs[boxes].shape)
    if rank not in (2, 3) or outputs[boxes].shape[-1] not in (4, 5, None):
        raise ModelError(f"{boxes} {shown(outputs[boxes].shape)} holds no boxes, which are [batch, number, 4]")
    left = [spec for spec in left if spec.name != boxes]
    wide = [spec for spec in left if len(spec.shape) == rank == 3]
    if len(left) == len(wide) == 1 and "classes" not in given:
        cells, (_, first, last) = outputs[boxes].shape[1], wide[0].shape
        is_turned = cells is not None and first != cells and last == cells
        return _Roles(boxes, wide[0].name, None, None, first if is_turned else last, True, is_turned)
    flat = [spec for spec in left if len(spec.shape) == rank - 1 and not _is_count(spec, rank)]
    count = given.get("count") or _first(left, lambda spec: _is_count(spec, rank))
    own = boxes if outputs[boxes].shape[-1] == 5 else None  # the score beside the box
    scores = own or given.get("scores") or _first(flat, lambda spec: _told_by_name(spec.name) == "scores")
    classes = given.get("classes") or _first(
        flat, lambda spec: _told_by_name(spec.name) == "classes" or spec.dtype.startswith("int")
    )
    is_certain = scores is not None or classes is not None
    unnamed = [spec.name for spec in flat if spec.name not in (scores, classes)]
    if classes is None and unnamed:  # TensorFlow Lite's order: boxes, classes, scores
        classes = unnamed.pop(0)
    if scores is None and unnamed:
        scores = unnamed.pop(0)
    for taken in (scores, classes):
        if taken is not None and taken != own and len(outputs[taken].shape) != rank - 1:
            raise ModelError(f"{taken} {shown(outputs[taken].shape)} is not one value for each of {boxes}")
    if scores is None or classes is None:
        raise ModelError(f"no outputs hold scores and classes beside the boxes; this model's are {outputs_of(facts)}")
    return _Roles(boxes, scores, classes, count, None, is_certain)


def _row_output(facts: ModelFacts, columns: Sequence[Column] | None) -> TensorSpec | None:
    """The output whose rows are boxes, score and class: named by `columns`, else of six or seven values and alone in
    that. Raises `ModelError`."""
    if columns is not None and not {"x1", "y1", "x2", "y2", "score", "class"} <= set(columns):
        raise ModelError("options.columns wants x1, y1, x2, y2, score and class, and batch where the rows have it")
    wanted = _ROWS if columns is None else {len(columns): columns}
    for spec in facts.outputs:
        is_list = len(spec.shape) == 2 or (columns is not None and len(spec.shape) == 3)
        rest_is_small = all(len(other.shape) <= 1 for other in facts.outputs if other is not spec)
        if is_list and spec.shape[-1] in wanted and spec.shape[0] is None and rest_is_small:
            return spec
        if is_list and columns is not None and spec.shape[-1] in (None, len(columns)):
            return spec
    return None


def _told_by_name(name: str) -> str | None:
    lowered = name.lower()
    return next((role for role, words in _WORDS.items() if any(word in lowered for word in words)), None)


def _first(specs: Sequence[TensorSpec], fits: Any) -> str | None:
    return next((spec.name for spec in specs if fits(spec)), None)


def _is_boxes(spec: TensorSpec) -> bool:
    return len(spec.shape) in (2, 3) and spec.shape[-1] == 4


def _is_scored(spec: TensorSpec) -> bool:
    return len(spec.shape) == 3 and spec.shape[-1] == 5


def _is_count(spec: TensorSpec, rank: int) -> bool:
    return rank == 3 and (len(spec.shape) == 1 or (len(spec.shape) == 2 and spec.shape[1] == 1))


def _box_form(facts: ModelFacts, roles: _Roles) -> tuple[BoxFormat, BoxUnits]:
    if is_interleaved(facts) or roles.boxes.startswith("detection_boxes"):
        return "yxyx", "normalized"
    if _is_ultraface(roles):
        return "xyxy", "normalized"
    return "xyxy", "pixels"


def _is_ultraface(roles: _Roles) -> bool:
    """UltraFace: two columns of scores, background and face."""
    return roles.classes is None and roles.columns == 2 and (roles.scores, roles.boxes) == ("scores", "boxes")


def _columns(meaning: Meaning, options: SsdOptions, roles: _Roles) -> slice:
    """The columns of dense scores that are classes."""
    background = options.background
    labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
    if background == "auto":
        spare = labels is not None and roles.columns == len(labels) + 1
        background = "first" if spare or (labels is None and roles.columns == 2) else "none"
    if background != "none" and (roles.columns or 0) < 2:
        raise ModelError(f"options.background: of {roles.columns} column of scores none is left")
    return {"none": slice(None), "first": slice(1, None), "last": slice(None, -1)}[background]


def _are_whole(values: NDArray[Any]) -> bool:
    numbers = np.asarray(values, np.float32)
    return bool(np.isfinite(numbers).all() and (numbers == np.round(numbers)).all())
