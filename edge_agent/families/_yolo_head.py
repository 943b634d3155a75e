"""What the tensors of a YOLO model say of its head: which kind, which task, and what lies where in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from edge_agent.config import Count
from edge_agent.data import ModelFacts, TensorSpec
from edge_agent.errors import ModelError
from edge_agent.families._boxes import MANY_CLASSES, BoxFormat, BoxOptions, BoxUnits
from edge_agent.families._metadata import file_labels, literal
from edge_agent.families._pictures import output_of, outputs_of, picture_sides, shown

Head = Literal["dense", "objectness", "yolox", "end_to_end", "queries"]
Task = Literal["detect", "segment", "pose", "obb"]

STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
"""That YOLO models have, the commonest first."""
ANCHORS = 3  # a cell, of heads with objectness
_MOST_END_TO_END = 1000
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
class YoloHead:
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


def read_head(facts: ModelFacts, options: YoloOptions, labels: Sequence[str] | None) -> YoloHead:
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
        classes = known or MANY_CLASSES  # the output does not say how many there are
    if classes < 1:
        raise ModelError(f"the output {shown(shape)} leaves no room for classes in a {kind} head for {task}")
    named = prototypes.name if prototypes is not None and task == "segment" else None
    return YoloHead(kind, task, boxes.name, rows_first, classes, extras, values, named)


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
    if told := told_task(facts):
        return told
    return "segment" if prototypes is not None else None


def told_task(facts: ModelFacts) -> Task | None:
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
    cells = cells_of(facts, options)
    if first is not None and (last is None or last > first):
        return "dense"
    if last is not None and first is not None:
        if first in (ANCHORS * side for side in cells):
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


def cells_of(facts: ModelFacts, options: YoloOptions) -> list[int]:
    """How many cells the strides may make; none where the input's size is not fixed."""
    height, width = picture_sides(facts)
    if not height or not width:
        return []
    tried = [options.strides] if options.strides else STRIDES
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


def shape_of(facts: ModelFacts, output: str) -> tuple[int | None, ...]:
    return output_of(facts, output).shape
