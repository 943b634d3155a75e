"""Detectors whose boxes, scores and classes come in tensors of their own.

- Chosen already: boxes [B, N, 4], scores [B, N], classes [B, N], and how many count [B] or [B, 1] (EfficientNMS,
  TensorFlow's detection models, torchvision's, RT-DETR exported with its post-processing).
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
from edge_agent.errors import ModelError
from edge_agent.families import Guess, Meaning
from edge_agent.families._boxes import (
    BoxFormat,
    BoxOptions,
    BoxUnits,
    Selection,
    corners_of,
    detections,
    finite,
    nothing,
    softmax,
)
from edge_agent.families._metadata import file_labels, labels_of
from edge_agent.families._pictures import RGB_0_1, RGB_SIGNED, picture_spec, picture_tensor, shown
from edge_agent.geometry import Placement

_WORDS = {
    "count": ("num", "count", "valid"),
    "boxes": ("box", "loc"),
    "scores": ("score", "conf", "prob"),
    "classes": ("class", "label", "cls"),
}


class SsdOptions(BoxOptions):
    """`[models.<name>.options]` of such a detector. `outputs`: the tensors of boxes, scores, classes and count, where
    they are not told by name and shape; `first_class`: the number that the model gives the first label;
    `background`: which column of the scores is no class."""

    outputs: dict[Literal["boxes", "scores", "classes", "count"], str] = msgspec.field(default_factory=dict)
    box_format: BoxFormat | None = None
    box_units: BoxUnits | None = None
    first_class: int = 0
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
    task = "detect"
    reduction = None

    @staticmethod
    def recognise(facts: ModelFacts) -> Guess | None:
        try:
            roles = _roles(facts, {})
        except ModelError:
            return None
        listed = ", ".join(f"{role} {name!r}" for role in _WORDS if (name := getattr(roles, role)))
        scores = next(spec for spec in facts.outputs if spec.name == roles.scores)
        told = _told_by_name(scores.name) == "scores" or roles.count is not None
        form, units = _box_form(facts, roles)
        because = [f"the outputs are {listed}", f"boxes are taken for {form}, {units}"]
        return Guess(3 if told else 2 if roles.classes else 1, because)

    def __init__(self, meaning: Meaning) -> None:
        options = meaning.options
        assert isinstance(options, SsdOptions)
        facts = meaning.facts
        self._roles = roles = _roles(facts, {str(role): name for role, name in options.outputs.items()})
        self._options = options
        is_tensorflow = _is_tensorflow(facts)
        # Detectors of this kind see the whole picture stretched; TensorFlow's want -1..1.
        self.preprocess = picture_spec(meaning, resize="stretch", **(RGB_SIGNED if is_tensorflow else RGB_0_1))
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

    @property
    def labels(self) -> Sequence[str]:
        return self.names.labels

    def reduce(self, outputs: Tensors) -> Sequence[Candidates]:
        roles = self._roles
        boxes, scores = outputs[roles.boxes], outputs[roles.scores]
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
        boxes, scores, class_ids = candidates.boxes, candidates.scores, candidates.class_ids
        if (sound := finite(boxes, scores)) is not None:
            boxes, scores, class_ids = boxes[sound], scores[sound], class_ids[sound]
        if not len(scores):
            return nothing()
        if self._scale is not None:
            boxes = boxes * self._scale
        corners = corners_of(boxes, self._form)
        order = self._selection.keep(corners, scores, class_ids)
        return detections(corners[order], scores[order], class_ids[order], placement)

    def _chosen(self, boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any], count: int) -> Candidates:
        with np.errstate(invalid="ignore"):
            numbers = classes.astype(np.float32) - self._options.first_class
            valid = (scores.astype(np.float32) >= np.float32(self._selection.threshold)) & (numbers >= 0)
            valid &= numbers < len(self.labels)
        valid[max(0, count) :] = False
        rows = np.flatnonzero(valid)
        return Candidates(
            rows, boxes[rows].astype(np.float32), scores[rows].astype(np.float32), numbers[rows].astype(np.int64)
        )

    def _dense(self, boxes: NDArray[Any], scores: NDArray[Any]) -> Candidates:
        with np.errstate(invalid="ignore", over="ignore"):
            if self._options.activation == "softmax":
                scores = softmax(scores)
            elif self._options.activation == "sigmoid":
                scores = 1 / (1 + np.exp(-np.clip(scores.astype(np.float32), -80, 80)))
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
        # The outputs do not say how many classes there are; TensorFlow's COCO models have 90.
        return tuple(given) if given is not None else tuple(f"class_{i}" for i in range(1000))


Family = SsdFamily


def _roles(facts: ModelFacts, given: Mapping[str, str]) -> _Roles:
    """Which output is what, by the entry, by name, by shape and by order. Raises `ModelError`."""
    outputs = {spec.name: spec for spec in facts.outputs}
    for name in given.values():
        if name not in outputs:
            raise ModelError(f"options.outputs: there is no output {name!r}{plugins.nearest(name, list(outputs))}")
    left = [spec for spec in facts.outputs if spec.name not in given.values()]
    boxes = given.get("boxes") or _first(left, lambda spec: _is_boxes(spec) and _told_by_name(spec.name) != "scores")
    if boxes is None:
        raise ModelError(f"no output holds boxes, [batch, number, 4]; this model's are {_listed(facts)}")
    rank = len(outputs[boxes].shape)
    left = [spec for spec in left if spec.name != boxes]
    wide = [spec for spec in left if len(spec.shape) == rank == 3]
    if len(left) == len(wide) == 1 and "classes" not in given:
        cells, (_, first, last) = outputs[boxes].shape[1], wide[0].shape
        is_turned = cells is not None and first != cells and last == cells
        return _Roles(boxes, wide[0].name, None, None, first if is_turned else last, True, is_turned)
    flat = [spec for spec in left if len(spec.shape) == rank - 1 and not _is_count(spec, rank)]
    count = given.get("count") or _first(left, lambda spec: _is_count(spec, rank))
    scores = given.get("scores") or _first(flat, lambda spec: _told_by_name(spec.name) == "scores")
    classes = given.get("classes") or _first(
        flat, lambda spec: _told_by_name(spec.name) == "classes" or spec.dtype.startswith("int")
    )
    is_certain = scores is not None or classes is not None
    unnamed = [spec.name for spec in flat if spec.name not in (scores, classes)]
    if classes is None and unnamed:  # TensorFlow Lite's order: boxes, classes, scores
        classes = unnamed.pop(0)
    if scores is None and unnamed:
        scores = unnamed.pop(0)
    if scores is None or classes is None:
        raise ModelError(f"no outputs hold scores and classes beside the boxes; this model's are {_listed(facts)}")
    return _Roles(boxes, scores, classes, count, None, is_certain)


def _told_by_name(name: str) -> str | None:
    lowered = name.lower()
    return next((role for role, words in _WORDS.items() if any(word in lowered for word in words)), None)


def _first(specs: Sequence[TensorSpec], fits: Any) -> str | None:
    return next((spec.name for spec in specs if fits(spec)), None)


def _is_boxes(spec: TensorSpec) -> bool:
    return len(spec.shape) in (2, 3) and spec.shape[-1] == 4


def _is_count(spec: TensorSpec, rank: int) -> bool:
    return rank == 3 and (len(spec.shape) == 1 or (len(spec.shape) == 2 and spec.shape[1] == 1))


def _is_tensorflow(facts: ModelFacts) -> bool:
    """Whether it comes from TensorFlow, by its channels, which come last there."""
    shape = picture_tensor(facts).shape
    return shape[3] == 3 and shape[1] != 3


def _box_form(facts: ModelFacts, roles: _Roles) -> tuple[BoxFormat, BoxUnits]:
    if _is_tensorflow(facts) or roles.boxes.startswith("detection_boxes"):
        return "yxyx", "normalized"
    return "xyxy", "pixels"


def _columns(meaning: Meaning, options: SsdOptions, roles: _Roles) -> slice:
    """The columns of dense scores that are classes."""
    background = options.background
    labels = meaning.labels if meaning.labels is not None else file_labels(meaning.facts)
    if background == "auto":
        spare = labels is not None and roles.columns == len(labels) + 1
        background = "first" if spare or (labels is None and roles.columns == 2) else "none"
    return {"none": slice(None), "first": slice(1, None), "last": slice(None, -1)}[background]


def _are_whole(values: NDArray[Any]) -> bool:
    numbers = np.asarray(values, np.float32)
    return bool(np.isfinite(numbers).all() and (numbers == np.round(numbers)).all())


def _listed(facts: ModelFacts) -> str:
    return ", ".join(f"{spec.name} {shown(spec.shape)}" for spec in facts.outputs)
